"""The live share, opt-in: every so many steps, how much of a fixed sample of weights a step left unchanged."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_policy import estimate, optimizers, ranks

_LOG = logging.getLogger("precision_policy")
_PER_GROUP: Final = 2**16  # elements


class Monitor:
    """Logs one INFO line per optimizer every ``every`` steps, on rank zero.

    Only a sample is copied, at most 2**16 elements per parameter group, and only in the steps that are reported.

    Args:
        every: the number of steps between two lines, at least 1.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._before: weakref.WeakKeyDictionary[Optimizer, list[torch.Tensor]] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []

    def start(self) -> None:
        """Register torch's global step hooks."""
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def stop(self) -> None:
        """Remove them."""
        while self._handles:
            self._handles.pop().remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if step % self._every == 0 and ranks.is_rank_zero():
            self._before[optimizer] = [view.clone() for view in _sample(optimizer)]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        before = self._before.pop(optimizer, None)
        if not before:
            return
        same = sum(int((old == new).sum()) for old, new in zip(before, _sample(optimizer), strict=True))
        total = sum(old.numel() for old in before)
        rates = ", ".join(sorted({f"{estimate.as_float(group.get('lr')):g}" for group in optimizer.param_groups}))
        message = "step %d: %.1f %% of a sample of %d weights left unchanged by %s at lr %s"
        _LOG.info(message, self._steps[optimizer], 100 * same / total, total, optimizers.name(optimizer), rates)


def _sample(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """The same views every time: evenly spread over each group's trainable parameters."""
    for group in optimizer.param_groups:
        params = [estimate.local(p.detach()) for p in group["params"] if p.requires_grad]
        params = [p for p in params if not p.is_meta and p.layout is torch.strided]
        stride = max(1, -(-sum(p.numel() for p in params) // _PER_GROUP))
        # A parameter smaller than the stride would always give its first element, and many of those would break the bound.
        offset = 0
        for param in params:
            for flat in estimate.flat_views(param):
                yield flat[offset::stride]
                offset = (offset - flat.numel()) % stride
