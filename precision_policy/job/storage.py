"""What is stored in bf16 and lost: said when an optimizer is made, looked at again at its first step, refused by ``strict``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from precision_policy.estimate import parameters
from precision_policy.job import holdings, optimizers, ranks, words
from precision_policy.job.events import Listener, StopJobError
from precision_policy.job.holdings import Holding
from precision_policy.job.optimizers import Known
from precision_policy.job.speaker import Speaker
from precision_policy.record import FROZEN_BASE, Record

if TYPE_CHECKING:
    from precision_policy.job.compute import Compute
    from precision_policy.job.master_weights import MasterWeights


class Bf16AdamError(StopJobError):
    """Raised instead of the warning under ``precision_policy=strict``."""

    def __repr__(self) -> str:
        # hydra.utils.instantiate shows an error by its repr, which would run the lines together.
        return f"{type(self).__name__}: {self}"


@dataclass
class _Seen:
    """What was done about an optimizer.

    Attributes:
        warned: whether it was found to lose updates.
        began: whether its first step has begun.
        ended: whether its first step has come to its end.
    """

    warned: bool = False
    began: bool = False
    ended: bool = False


class Storage(Listener):
    """Warns of optimizers that lose updates of bf16 weights, or stops the job.

    When an optimizer is judged depends on what can still change the verdict. Mostly nothing can, and it is judged as soon as
    its parameter groups exist. Some tell only at their first step what they hold. And where master weights are kept, or where
    some of the job's models have adapters, only the step itself tells what it did, and with whose parameters.

    Args:
        record: the job's.
        speaker: says what is found.
        option: how the option that is on is called.
        compute: tells in which modules an optimizer's parameters were called.
        masters: what keeps master weights in this job, if anything does.
    """

    def __init__(
        self, record: Record, speaker: Speaker, option: str, compute: Compute, masters: MasterWeights | None = None
    ) -> None:
        self._record = record
        self._speaker = speaker
        self._option = option
        self._compute = compute
        self._masters = masters
        frozen = [decision.rule in FROZEN_BASE for decision in record.decisions]
        self._has_adapters = any(frozen)
        self._has_only_adapters = any(frozen) and all(frozen)
        self._is_off = record.bf16_adam == "ignore"
        self._is_strict = record.bf16_adam == "error" and not self._has_only_adapters
        self._waits_for_step = masters is not None or (self._has_adapters and not self._has_only_adapters)
        self._seen: weakref.WeakKeyDictionary[Optimizer, _Seen] = weakref.WeakKeyDictionary()
        self._has_job_begun = False
        self._said_share = 0.0  # the worst of which the job was warned

    def made(self, optimizer: Optimizer) -> None:
        """Judge an optimizer by a look at some of its parameters, where nothing that comes later can change the verdict."""
        self._seen[optimizer] = _Seen()
        if self._is_off or self._waits_for_step or self._has_only_adapters:
            return
        known = optimizers.look_up(optimizer)
        if known is None or known.at_first_step or not holdings.may_hold_bf16(optimizer):
            return
        # An engine that is loaded may swap in fp32 copies before the first step: an error waits for that.
        if not (self._is_strict and optimizers.is_engine_loaded()):
            self._judge(optimizer, known)

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Look again at the first step: parameters may have been added, recast, or swapped for fp32 copies since."""
        seen = self._seen.setdefault(optimizer, _Seen())  # a copy was never made by its constructor
        if seen.began:
            return
        seen.began = True
        if self._is_off:
            return
        known = optimizers.look_up(optimizer)
        if known is not None:
            self._look_before_first_step(optimizer, known)
        if not self._has_job_begun:
            self._has_job_begun = True
            self._look_at_job()

    def stepped(self, optimizer: Optimizer) -> None:
        """Judge an optimizer of which only its first step tells."""
        seen = self._seen.setdefault(optimizer, _Seen())
        if seen.ended:
            return
        seen.ended = True
        if self._waits_for_step and not self._is_off:
            self._look_after_first_step(optimizer)

    def _look_before_first_step(self, optimizer: Optimizer, known: Known) -> None:
        """Tell of adapters, judge what was not warned of before, or take the warning back where it is not true any more."""
        if known.keeps(optimizer, torch.bfloat16) == "master":
            self._tell_what_is_wasted(optimizer)
        if self._waits_for_step:
            return
        if self._has_only_adapters:
            self._tell_of_adapters(optimizer, known)
        elif not self._seen[optimizer].warned:
            self._judge(optimizer, known)
        elif not holdings.bf16_groups(optimizer):
            self._take_back(optimizer)

    def _look_at_job(self) -> None:
        """Say what is true of all optimizers that were made before the job's first step."""
        if self._has_only_adapters or not ranks.is_rank_zero():
            return
        if len(self._seen) == 1:
            self._tell_what_did_not_arrive(*self._seen)
        elif not self._waits_for_step and not self._is_strict:
            self._sum_up()

    def _look_after_first_step(self, optimizer: Optimizer) -> None:
        """Judge by what the step did: some weights may be left without master weights, and some may be adapters."""
        known = optimizers.look_up(optimizer)
        count = sum(len(group.params) for group in holdings.bf16_groups(optimizer))
        if known is None or not count:
            return
        reasons: dict[str, int] = {}
        if self._masters is not None:
            kept = self._masters.kept(optimizer)
            if kept is None:
                reasons = {words.NOT_BY_TORCH: count}
            elif kept.tensors < count:
                reasons = {reason: tensors for reason, tensors in kept.refused.items() if reason != words.FP16}
            if not reasons:
                return
        modules = self._compute.modules(optimizer)
        is_frozen_base = any(map(_has_frozen, modules))
        if self._has_only_adapters or (self._has_adapters and is_frozen_base):
            self._tell_of_adapters(optimizer, known)
        else:
            self._judge(optimizer, known, reasons, is_adapter_perhaps=self._has_adapters and not modules)

    def _judge(
        self,
        optimizer: Optimizer,
        known: Known,
        reasons: Mapping[str, int] | None = None,
        is_adapter_perhaps: bool = False,
    ) -> None:
        """Warn of an optimizer that loses updates of bf16 weights, or stop the job.

        Args:
            optimizer: the optimizer.
            known: what is known of it.
            reasons: why it has no master weights, where these were asked for, and for how many tensors.
            is_adapter_perhaps: whether it may train adapters, which stop no job.
        """
        if known.keeps(optimizer, torch.bfloat16) != "nothing":
            return
        stops = self._is_strict and not is_adapter_perhaps
        is_to_be_said = "warning" not in self._speaker.said and ranks.is_rank_zero()
        if not stops and not is_to_be_said:
            self._seen[optimizer].warned = bool(holdings.bf16_groups(optimizer))
            return
        holding = holdings.read(optimizer, known, self._record.sample)
        if holding is None:
            return
        self._seen[optimizer].warned = True
        if reasons:
            told = words.refused(self._option, holding, reasons)
        else:
            told = words.losing(self._option, self._record, holding, several=len(self._seen) > 1)
        if self._is_strict and is_adapter_perhaps:
            told = words.perhaps_adapters(self._option, told)
        if stops:
            self._speaker.say_once("warning", logging.ERROR, told.text)
            raise Bf16AdamError(told.short)
        if holding.loss is not None and holding.loss.is_nearly_nothing:
            self._speaker.say_once("nearly nothing", logging.INFO, told.text)
        elif self._speaker.is_first("warning"):
            self._said_share = words.share(holding)
            self._speaker.say(logging.WARNING, told.text)

    def _sum_up(self) -> None:
        """Say in one line what several optimizers lose together: a WARNING where that is worse than what was said."""
        losing: list[Holding] = []
        params: dict[int, torch.Tensor] = {}
        for optimizer, seen in list(self._seen.items()):
            known = optimizers.look_up(optimizer)
            if known is None or (known.at_first_step and not seen.began):
                continue
            holding = holdings.read(optimizer, known, self._record.sample)
            if holding is not None and known.keeps(optimizer, torch.bfloat16) == "nothing":
                losing.append(holding)
                # An optimizer may wrap another one over the same parameters.
                for group in holdings.bf16_groups(optimizer):
                    params.update((id(param), param) for param in group.params)
        if len(losing) < 2:
            return
        worst = max(map(words.share, losing))
        # As it is shown, in tenths of a percent.
        is_worse = round(worst, 3) > round(self._said_share, 3) and worst >= holdings.NEARLY_NOTHING
        text = words.summed_up(self._option, losing, holdings.amount(list(params.values())))
        self._speaker.say(logging.WARNING if is_worse else logging.INFO, text)

    def _tell_of_adapters(self, optimizer: Optimizer, known: Known) -> None:
        """Say once what adapters lose; they are left alone."""
        if known.keeps(optimizer, torch.bfloat16) != "nothing" or not ranks.is_rank_zero():
            return
        holding = holdings.read(optimizer, known, self._record.sample)
        if holding is not None:
            text = words.adapters(self._option, self._record, holding)
            self._speaker.say_once("adapters", logging.INFO, text)

    def _tell_what_did_not_arrive(self, optimizer: Optimizer) -> None:
        """Say that fp32 was asked for and bf16 came: of the job's only optimizer, as others may be about other models."""
        groups = holdings.bf16_groups(optimizer)
        if not groups or not words.asked_for_fp32(self._record):
            return
        came = holdings.amount([p for group in groups for p in group.params])
        tensors = sum(len(group["params"]) for group in optimizer.param_groups)
        names = [name for group in groups for name in group.names][:3]
        text = words.not_arrived(self._option, self._record, came.tensors, tensors, names)
        # Of an optimizer that was warned of, this is the reason.
        self._speaker.say(logging.INFO if self._seen[optimizer].warned else logging.WARNING, text)

    def _tell_what_is_wasted(self, optimizer: Optimizer) -> None:
        fp32 = parameters.trainable(holdings.trained(optimizer), (torch.float32,))
        if fp32:
            elements = sum(parameters.local(p).numel() for p in fp32)
            text = words.wasted(self._option, optimizers.name(optimizer), elements)
            self._speaker.say_once("wasted", logging.INFO, text)

    def _take_back(self, optimizer: Optimizer) -> None:
        """Take back what was said at construction, so that the next optimizer that loses something is warned of."""
        self._seen[optimizer].warned = False
        self._speaker.forget("warning")
        text = words.taken_back(self._option, optimizers.name(optimizer))
        self._speaker.say_once("taken back", logging.INFO, text)


def _has_frozen(module: torch.nn.Module) -> bool:
    return any(not param.requires_grad for param in module.parameters())
