"""The watch on optimizers: while a job runs, each one is judged as soon as its parameter groups exist.

Armed, it costs one call when an optimizer is constructed and nothing per training step. ``torch.optim.Optimizer`` has no
hook for construction, so its ``__init__`` is wrapped for the time of the job; every optimizer that a config, plain code or
a library builds ends up there.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import torch
from torch.optim import Optimizer

from precision_policy import ranks

_LOG = logging.getLogger("precision_policy")


class Watch:
    """Warns once about a torch Adam over trainable bf16 parameters.

    Args:
        fix: the override that gives this application fp32 storage.
    """

    def __init__(self, fix: str) -> None:
        self._fix = fix
        self._lock = threading.Lock()
        self._warned = False
        self._original: Any = None
        self._wrapper: Any = None

    def arm(self) -> None:
        """Begin to judge the optimizers that are constructed from now on."""
        original = Optimizer.__init__

        @functools.wraps(original)
        def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            if self._wrapper is not None:
                self._judge(optimizer)

        self._original, self._wrapper = original, __init__
        Optimizer.__init__ = __init__  # type: ignore[assignment, method-assign]  # put back by disarm

    def disarm(self) -> None:
        """Leave torch as it was. Whoever wrapped the constructor on top of the watch keeps it, and the watch in it sleeps."""
        wrapper, self._wrapper = self._wrapper, None
        if wrapper is not None and Optimizer.__init__ is wrapper:
            Optimizer.__init__ = self._original  # type: ignore[method-assign]  # as above

    def _judge(self, optimizer: Optimizer) -> None:
        if self._warned or not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            return
        low = [p for group in optimizer.param_groups for p in group["params"] if p.dtype is torch.bfloat16]
        low = [parameter for parameter in low if parameter.requires_grad]
        with self._lock:
            if not low or self._warned:
                return
            self._warned = True
        if ranks.is_rank_zero():
            _LOG.warning(
                "%s holds %d trainable bf16 tensors (%d elements) and keeps no fp32 master copy: updates under half a bf16 "
                "step of a weight are rounded away. Fix: %s",
                _name(optimizer),
                len(low),
                sum(parameter.numel() for parameter in low),
                self._fix,
            )


def _name(optimizer: Optimizer) -> str:
    kind = type(optimizer)
    module = "torch.optim" if kind.__module__.startswith("torch.optim.") else kind.__module__
    return f"{module}.{kind.__qualname__}"
