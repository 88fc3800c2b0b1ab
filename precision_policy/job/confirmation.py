"""One line that says what came of it all: stored, updated and computed in what, and how much is frozen.

It comes when every optimizer that the job has made has stepped once, so that it is true of the whole job. Where one of them
steps again before another has begun, it does not wait any longer.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from precision_policy.estimate import parameters
from precision_policy.job import holdings, optimizers, ranks, words
from precision_policy.job.compute import Computed
from precision_policy.job.events import Listener
from precision_policy.job.holdings import Amount
from precision_policy.job.speaker import Speaker
from precision_policy.job.words import Part, Sum

if TYPE_CHECKING:
    from torch import nn

    from precision_policy.job.compute import Compute
    from precision_policy.job.master_weights import MasterWeights


@dataclass
class _Note:
    """What is to be told of some parameters of one optimizer.

    Attributes:
        stored: what they are stored in, in words.
        updated: what they are updated in, in words.
        computed: what they are computed in.
        modules: the outermost modules in which they were called, by number.
        total: how much there is of them.
    """

    stored: str
    updated: str
    computed: Computed
    modules: set[int]
    total: Sum


class Confirmation(Listener):
    """Tells once what is stored, updated and computed in what; and again of later optimizers only where they differ.

    Args:
        speaker: says it.
        option: how the option that is on is called.
        compute: tells what an optimizer's parameters are computed in, and in which modules they were called.
        masters: what keeps master weights in this job, if anything does.
        wants_bf16: whether master weights make sense with bf16 alone; the option ``mixed`` is for fp32 as well.
    """

    def __init__(
        self, speaker: Speaker, option: str, compute: Compute, masters: MasterWeights | None = None, wants_bf16: bool = True
    ) -> None:
        self._wants_bf16 = wants_bf16
        self._speaker = speaker
        self._option = option
        self._compute = compute
        self._masters = masters
        self._awaited: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._first_param: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._told: set[Part] = set()
        self._begin_a_line()

    def _begin_a_line(self) -> None:
        self._optimizers = 0
        self._notes: list[_Note] = []
        self._frozen: dict[str, Amount] = {}
        # Parameters and modules by number. An optimizer may wrap another one over the same parameters: each is counted once.
        self._counted: set[int] = set()

    def made(self, optimizer: Optimizer) -> None:
        """Wait for its first step."""
        self._stepped.discard(optimizer)
        self._awaited.add(optimizer)
        if holdings.may_hold_bf16(optimizer):
            self._first_param[optimizer] = _first_param(optimizer)

    def stepped(self, optimizer: Optimizer) -> None:
        """Note what its first step did, and tell it when no other optimizer is to be waited for."""
        if optimizer in self._stepped:
            if self._optimizers:
                self._tell()
            return
        self._stepped.add(optimizer)
        self._awaited.discard(optimizer)
        if ranks.is_rank_zero():
            self._note(optimizer)
            if self._optimizers and not self._awaited:
                self._tell()

    def end(self) -> None:
        """Tell what still waits for an optimizer that never stepped."""
        if self._optimizers:
            self._tell()

    def _note(self, optimizer: Optimizer) -> None:
        """Add what one optimizer trains, and what is frozen beside it in the modules that were called."""
        trained = holdings.trained(optimizer)
        params = [p for p in trained if id(p) not in self._counted]
        if not params:
            return
        is_rest = len(params) < len(trained)
        self._optimizers += 1
        self._counted.update(map(id, params))
        answer = self._compute.answer(optimizer)  # about what is stored in fp32
        modules = self._compute.modules(optimizer)
        for dtype in dict.fromkeys(p.dtype for p in params):
            of_dtype = [p for p in params if p.dtype is dtype]
            stored = words.ENGINES_COPIES if self._is_swapped(optimizer, dtype) else parameters.short_name(dtype)
            computed = answer if dtype is torch.float32 else Computed(None, None)
            for updated, total in self._updated(optimizer, dtype, of_dtype, is_rest):
                self._notes.append(_Note(stored, updated, computed, set(map(id, modules)), total))
        self._note_frozen(optimizer, modules)

    def _note_frozen(self, optimizer: Optimizer, modules: list[nn.Module]) -> None:
        """Add what is frozen in an optimizer's groups and in these modules, each tensor once in a line."""
        beside = [p for group in optimizer.param_groups for p in group["params"]]
        for module in modules:
            if id(module) not in self._counted:
                self._counted.add(id(module))
                beside += module.parameters()
        for param in beside:
            if not param.requires_grad and id(param) not in self._counted:
                self._counted.add(id(param))
                dtype = parameters.short_name(param.dtype)
                self._frozen[dtype] = self._frozen.get(dtype, Amount(0, 0)) + holdings.amount([param])

    def _is_swapped(self, optimizer: Optimizer, dtype: torch.dtype) -> bool:
        """Whether fp32 parameters have taken the place of bf16 ones since the optimizer was made."""
        first = self._first_param.get(optimizer)
        return dtype is torch.float32 and first is not None and first != _first_param(optimizer)

    def _updated(
        self, optimizer: Optimizer, dtype: torch.dtype, params: list[torch.Tensor], is_rest: bool
    ) -> Iterator[tuple[str, Sum]]:
        """What parameters are updated in, in words, and how many of them: told from what the step did.

        Args:
            optimizer: the optimizer.
            dtype: the dtype of all the parameters.
            params: the parameters.
            is_rest: whether another optimizer, inside this one, was noted for the others.
        """
        whole = holdings.amount(params)
        own = _own_update(optimizer, dtype)
        if self._masters is None or dtype not in (torch.bfloat16, torch.float16):
            yield own, Sum(whole)
            return
        kept = self._masters.kept(optimizer)
        if kept is None:
            yield own, Sum(whole, reasons=Counter({words.NOT_BY_TORCH: len(params)}))
            return
        if is_rest and kept.tensors and not kept.refused:
            # ZeroRedundancyOptimizer is told what the optimizer inside it did. The rest is updated on other ranks.
            yield words.UPDATED_BY_MASTER_WEIGHTS, Sum(whole)
            return
        if dtype is torch.float16:
            yield own if kept.refused else words.NOT_UPDATED, Sum(whole, reasons=_reasons(kept.refused, dtype))
            return
        rest = whole
        if kept.tensors:
            served = whole
            if kept.tensors < len(params):
                served = Amount(kept.tensors, kept.elements, whole.partly)
            yield words.UPDATED_BY_MASTER_WEIGHTS, Sum(served, kept.added_bytes)
            rest = Amount(len(params) - kept.tensors, whole.elements - kept.elements, whole.partly)
        if rest.tensors > 0:
            reasons = _reasons(kept.refused, dtype)
            yield own if reasons else words.NOT_UPDATED, Sum(rest, reasons=reasons)

    def _tell(self) -> None:
        """Say what was noted; after the first line, only what has not been said yet."""
        by_module: dict[int, Computed] = {}
        for note in self._notes:
            if note.computed.dtype is not None:
                by_module.update(dict.fromkeys(note.modules, note.computed))
        parts: dict[Part, Sum] = {}
        for note in self._notes:
            computed = _computed(note, by_module)
            part = Part(note.stored, note.updated, words.computed_in(computed.dtype, computed.by))
            parts.setdefault(part, Sum()).add(note.total)
        remark = ""
        if self._wants_bf16 and self._masters is not None:
            stored = {part.stored for part in [*parts, *self._told]}
            remark = "" if "bf16" in stored else words.NOTHING_IN_BF16
        if not parts.keys() <= self._told:
            text = words.confirmed(self._option, parts, self._optimizers, self._frozen, remark)
            self._speaker.say(logging.INFO, text)
        self._told.update(parts)
        self._begin_a_line()


def _computed(note: _Note, by_module: Mapping[int, Computed]) -> Computed:
    """What is known of some parameters' compute: where their gradients do not tell, those of others of the same module may."""
    if note.computed.dtype is None:
        for number in note.modules:
            if number in by_module:
                return by_module[number]
    return note.computed


def _reasons(refused: Mapping[str, int], dtype: torch.dtype) -> Counter[str]:
    """Those of an optimizer's reasons that are about its parameters of one dtype: a single one is about fp16."""
    is_fp16 = dtype is torch.float16
    return Counter({reason: count for reason, count in refused.items() if (reason == words.FP16) is is_fp16})


def _own_update(optimizer: Optimizer, dtype: torch.dtype) -> str:
    """What an optimizer updates parameters in by itself, in words; empty where that is not known."""
    known = optimizers.look_up(optimizer)
    keeps = "nothing" if known is None else known.keeps(optimizer, dtype)
    if keeps != "nothing" and dtype in (torch.bfloat16, torch.float16):
        return words.updated_by(optimizers.name(optimizer), keeps)
    # A step of the application's own may do anything, also where it is a subclass of a known one.
    if optimizers.steps_as_known(optimizer):
        return words.updated_in(parameters.short_name(dtype))
    return ""


def _first_param(optimizer: Optimizer) -> int:
    """The number of its first parameter: one that is swapped has another."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            return id(param)
    return 0
