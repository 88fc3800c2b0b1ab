"""The live share, opt-in: every so many steps, how much of a fixed sample of weights a step left unchanged."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_policy.estimate import histogram as estimate
from precision_policy.estimate import parameters
from precision_policy.job import optimizers, ranks

_LOG = logging.getLogger("precision_policy")
_PER_GROUP: Final = 2**16  # elements
_Before = tuple[list[list[torch.Tensor]], list[torch.Tensor]]  # the trainable parameters by group, and their sample's values


class Monitor:
    """Logs one INFO line per optimizer every ``every`` steps, on rank zero.

    Only a sample is copied, at most 2**16 elements per parameter group, and only in the steps that are reported. What
    cannot be read is left out, and whatever goes wrong ends the report, never the job.

    Args:
        every: the number of steps between two lines, at least 1.
        option: how the option that speaks is called.
    """

    def __init__(self, every: int, option: str = "precision_policy") -> None:
        self._every = every
        self._option = option
        self._failed = False
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._before: weakref.WeakKeyDictionary[Optimizer, _Before] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []

    def start(self) -> None:
        """Register torch's global step hooks."""
        self._handles = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._guarded(self._before_step, optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._guarded(self._after_step, optimizer)),
        ]

    def stop(self) -> None:
        """Remove them."""
        while self._handles:
            self._handles.pop().remove()

    def _guarded(self, look: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
        try:
            look(optimizer)
        except Exception:
            self._before.clear()
            if not self._failed:
                self._failed = True
                _LOG.warning("%s: the monitor could not read a step; the job goes on", self._option, exc_info=True)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        step = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if step % self._every == 0 and ranks.is_rank_zero():
            # The step may add groups to the optimizer: both looks are at what is there now.
            groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
            self._before[optimizer] = groups, [view.clone() for view in _sample(groups)]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        groups, before = self._before.pop(optimizer, ([], []))
        total = sum(old.numel() for old in before)
        if not total:
            return
        same = sum(int((old == new).sum()) for old, new in zip(before, _sample(groups), strict=True))
        rates = ", ".join(sorted({f"{estimate.as_float(group.get('lr')):g}" for group in optimizer.param_groups}))
        message = "%s: step %d: %.1f%% of a sample of %d weights left unchanged by %s at lr %s"
        arguments = (self._steps[optimizer], 100 * same / total, total, optimizers.name(optimizer), rates)
        _LOG.info(message, self._option, *arguments)


def _sample(groups: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The same views every time: evenly spread over each group's parameters, as far as these can be read."""
    views = []
    for group in groups:
        params = [parameters.local(p.detach()) for p in group]
        params = [p for p in params if not p.is_meta and p.layout is torch.strided]
        sample = parameters.EvenSample(parameters.stride_for(sum(p.numel() for p in params), _PER_GROUP))
        for param in params:
            try:
                views += sample.of(param)
            except (RuntimeError, NotImplementedError, TypeError, AttributeError):  # a tensor subclass may refuse in any way
                continue
    return views
