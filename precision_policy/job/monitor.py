"""The live share, opt-in: every so many steps, how much of a fixed sample of weights a step left unchanged."""

from __future__ import annotations

import copy
import logging
import weakref
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.optim import Optimizer

from precision_policy.estimate import histogram, parameters
from precision_policy.job import optimizers, ranks, words
from precision_policy.job.events import Listener
from precision_policy.job.pieces import LOW_BITS, WHOLE
from precision_policy.job.speaker import Speaker

_PER_GROUP: Final = 2**16  # elements
_INTEGERS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Sample:
    """The bits of some weights, parameter by parameter.

    Attributes:
        bits: of the weights.
        masters: of what is kept beside them for master weights, or None where there is nothing.
    """

    bits: list[torch.Tensor] = field(default_factory=list)
    masters: list[torch.Tensor | None] = field(default_factory=list)


class Monitor(Listener):
    """Logs one INFO line per optimizer every ``every`` steps, on rank zero.

    Only a sample is copied, at most 2**16 elements per parameter group, and only in the steps that are reported. What
    cannot be read is left out, and whatever goes wrong ends the report, never the job.

    Args:
        every: the number of steps between two lines, at least 1.
        speaker: says them.
        option: how the option that is on is called.
    """

    def __init__(self, every: int, speaker: Speaker, option: str = "precision_policy") -> None:
        self._every = every
        self._speaker = speaker
        self._option = option
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        # The trainable parameters by group, and what they were before the step that is reported.
        self._before: weakref.WeakKeyDictionary[Optimizer, tuple[list[list[torch.Tensor]], _Sample]]
        self._before = weakref.WeakKeyDictionary()

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Copy a sample of the weights before a step that is reported."""
        step = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if step % self._every == 0 and ranks.is_rank_zero():
            # The step may add groups to the optimizer: both looks are at what is there now.
            groups = []
            for group in optimizer.param_groups:
                groups.append([param for param in group["params"] if param.requires_grad])
            try:
                self._before[optimizer] = groups, _copy(_sample(optimizer, groups))
            except Exception:
                self._fail()

    def stepped(self, optimizer: Optimizer) -> None:
        """Compare the sample with what the step has made of it."""
        groups, before = self._before.pop(optimizer, ([], _Sample()))
        if not before.bits:
            return
        try:
            self._compare(optimizer, before, _sample(optimizer, groups))
        except Exception:
            self._fail()

    def _compare(self, optimizer: Optimizer, before: _Sample, after: _Sample) -> None:
        total, same = 0, 0
        for old, old_master, new, new_master in zip(before.bits, before.masters, after.bits, after.masters, strict=True):
            is_same = old == new
            if new_master is not None:
                before_step = _initial(old, new_master.dtype) if old_master is None else old_master
                is_same &= new_master == before_step
            total += old.numel()
            same += int(is_same.sum())
        if not total:
            return
        rates = {f"{histogram.as_float(group.get('lr')):g}" for group in optimizer.param_groups}
        has_masters = any(master is not None for master in after.masters)
        name, step = optimizers.name(optimizer), self._steps[optimizer]
        text = words.monitored(self._option, name, step, same, total, ", ".join(sorted(rates)), has_masters)
        self._speaker.say(logging.INFO, text)

    def _fail(self) -> None:
        self._before.clear()
        text = words.monitor_failed(self._option)
        self._speaker.say_once("monitor", logging.WARNING, text, exc_info=True)


def _copy(sample: _Sample) -> _Sample:
    masters = [None if master is None else master.clone() for master in sample.masters]
    return _Sample([bits.clone() for bits in sample.bits], masters)


@torch.no_grad()
def _sample(optimizer: Optimizer, groups: list[list[torch.Tensor]]) -> _Sample:
    """The same views every time: evenly spread over each group's parameters, as far as these can be read."""
    sample = _Sample()
    for group in groups:
        readable = [p for p in group if not p.is_meta and p.layout is torch.strided]
        stride = parameters.stride_for(sum(parameters.local(p).numel() for p in readable), _PER_GROUP)
        spread = parameters.EvenSample(stride)
        for param in readable:
            spread_again = copy.copy(spread)  # takes what is kept beside at the same places
            try:
                views = spread.of(_bits(param))
            except (RuntimeError, NotImplementedError, TypeError, AttributeError):  # a tensor subclass may refuse in any way
                continue
            master = _kept(optimizer, param)
            sample.bits += views
            sample.masters += [None] * len(views) if master is None else spread_again.of(master)
    return sample


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor as integers, so that a NaN equals itself."""
    part = parameters.local(tensor.detach())
    return part.view(_INTEGERS[part.element_size()])


def _kept(optimizer: Optimizer, param: torch.Tensor) -> torch.Tensor | None:
    """The bits of what is kept beside a parameter for master weights; None where there is nothing of its layout."""
    state = optimizer.state.get(param, {})
    for key in (LOW_BITS, WHOLE):
        if key in state:
            bits, weights = _bits(state[key]), parameters.local(param)
            if bits.shape == weights.shape and bits.stride() == weights.stride():
                return bits
    return None


def _initial(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What would have been kept beside bf16 weights before there was anything: no low bits, or the same number in fp32."""
    return torch.zeros_like(bits) if dtype is torch.int16 else bits.to(torch.int32) << 16
