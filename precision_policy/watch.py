"""The watch on optimizers: while a job runs, each one is judged as soon as its parameter groups exist.

Armed, it costs a look at each optimizer when it is constructed and again before its first step, and nothing per training
step. ``torch.optim.Optimizer`` has no hook for construction, so its ``__init__`` is wrapped for the time of the job: every
optimizer that a config, plain code or a library builds comes through there.

A process that the job spawns is a fresh interpreter, in which Hydra never runs. So the start of a process is wrapped too: the
watch travels in what is pickled for it, and arms itself where it arrives. A forked process has it anyway.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import astuple
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from precision_policy import optimizers, ranks, report, spawned

_LOG = logging.getLogger("precision_policy")

# Reading every dtype of 10,000 parameters takes a tenth of the time that constructing their optimizer takes. Of a group of
# more than the first number, construction looks at the second number, evenly spread, and the first step looks at all.
_ALL_UP_TO, _ELSE = 512, 64


class Bf16AdamError(RuntimeError):
    """Raised instead of the warning under ``precision_policy=strict``."""

    def __repr__(self) -> str:
        # hydra.utils.instantiate shows an error by its repr, which would run the aligned lines together.
        return f"{type(self).__name__}: {self}"


class Watch:
    """Judges each optimizer once, and says so once per job.

    Args:
        asked: what the config asked for, and the fix to name.
        action: what an optimizer that would lose updates leads to.
        said: what was said already, by a watch that this one goes on for.
    """

    def __init__(self, asked: report.Asked, action: Literal["warn", "error"] = "warn", said: Iterable[str] = ()) -> None:
        self._asked = asked
        self._action = action
        self._lock = threading.Lock()
        self._said = set(said)
        self._wraps: list[tuple[type, str, Any, Any]] = []

    def arm(self) -> None:
        """Begin to judge the optimizers that are constructed from now on."""

        def constructed(optimizer: Optimizer, init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            init(optimizer, *args, **kwargs)
            self._guarded(self._at_construction, optimizer)

        def started(process: BaseProcess, start: Callable[..., None]) -> None:
            self._guarded(setattr, process, "_precision_policy_watch", self)  # so that it is pickled with the process
            start(process)

        self._wrap(Optimizer, "__init__", constructed)
        self._wrap(BaseProcess, "start", started)

    def disarm(self) -> None:
        """Leave torch as it was. Whoever has wrapped the constructor on top of the watch keeps it; the watch sleeps in it."""
        wraps, self._wraps = self._wraps, []
        for kind, name, original, wrapper in wraps:
            if getattr(kind, name) is wrapper:
                setattr(kind, name, original)

    def __reduce__(self) -> Any:
        """In the process that it is unpickled in, it is armed."""
        return spawned.arm, (astuple(self._asked), self._action, set(self._said))

    def _wrap(self, kind: type, name: str, around: Callable[..., None]) -> None:
        original = getattr(kind, name)

        @functools.wraps(original)
        def wrapper(it: Any, *args: Any, **kwargs: Any) -> None:
            around(it, original, *args, **kwargs)

        setattr(kind, name, wrapper)
        self._wraps.append((kind, name, original, wrapper))

    def _guarded(self, look: Callable[..., None], *args: Any) -> None:
        """A diagnosis must not end a job, except by the error that ``strict`` asks for."""
        if not self._wraps:
            return
        try:
            look(*args)
        except Bf16AdamError:
            raise
        except Exception:
            self._say_once("failed", logging.WARNING, lambda: "an optimizer could not be judged", exc_info=True)

    def _at_construction(self, optimizer: Optimizer) -> None:
        known = optimizers.look_up(optimizer)
        if known is None:
            return
        if not known.engine_owned and _may_hold_low_precision(optimizer):
            self._judge(optimizer, known)
        elif not known.engine_owned and known.keeps(optimizer, torch.bfloat16) == "master":
            self._say_once("wasted", logging.INFO, lambda: report.wasted(optimizer))
        _before_first_step(optimizer, functools.partial(self._guarded, self._at_first_step, known))

    def _at_first_step(self, known: optimizers.Known, optimizer: Optimizer) -> None:
        """Parameters may have been added, recast, or swapped for fp32 copies by an engine since construction."""
        if not getattr(optimizer, "_precision_policy_warned", False):
            self._judge(optimizer, known)
        elif not report.low_precision(optimizer):
            self._say_once("taken back", logging.INFO, lambda: report.taken_back(optimizer))

    def _judge(self, optimizer: Optimizer, known: optimizers.Known) -> None:
        low = report.low_precision(optimizer)
        if not low or known.keeps(optimizer, torch.bfloat16) != "nothing":
            return
        if self._action == "error":
            raise Bf16AdamError(report.warning(optimizer, known, low, self._asked))
        optimizer._precision_policy_warned = True  # type: ignore[attr-defined]  # dies with it, unlike an id in a set
        self._say_once("warning", logging.WARNING, lambda: report.warning(optimizer, known, low, self._asked))

    def _say_once(self, what: str, level: int, text: Callable[[], str | None], **kwargs: Any) -> None:
        """Log on rank zero, once per job. The text is made only then: it reads the weights."""
        with self._lock:
            if what in self._said:
                return
            self._said.add(what)
        if ranks.is_rank_zero():
            message = text()
            if message is not None:
                _LOG.log(level, message, **kwargs)


def _may_hold_low_precision(optimizer: Optimizer) -> bool:
    # element_size is cheaper than dtype, which has to ask whether the tensor overrides it.
    return any(2 in map(torch.Tensor.element_size, _some(group["params"])) for group in optimizer.param_groups)


def _some(params: list[torch.Tensor]) -> list[torch.Tensor]:
    if len(params) <= _ALL_UP_TO:
        return params
    # Two strides without a common factor: layers repeat, and one stride alone could meet nothing but their biases.
    stride = 2 * len(params) // _ELSE
    return params[::stride] + params[1 :: stride + 1]


def _before_first_step(optimizer: Optimizer, look: Callable[[Optimizer], None]) -> None:
    """Call ``look`` once, before the optimizer's first step, through torch's public hooks, and leave no hook behind.

    torch walks over its hooks while it calls them, and one that removes itself in the middle of the walk ends the job. Two
    removals are safe: of a hook before the step while those after it are walked, and of the last hook in an OrderedDict. So
    a hook after the step removes both, in the first step in which nobody has registered another behind it.
    """
    after_step: list[Any] = []

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        first = not after_step
        while after_step:
            after_step.pop().remove()
        after_step.append(optimizer.register_step_post_hook(after))
        if first:
            look(optimizer)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        hooks = optimizer._optimizer_step_post_hooks
        if isinstance(hooks, OrderedDict) and next(reversed(hooks), None) == after_step[0].id:
            before_step.remove()
            after_step[0].remove()

    before_step = optimizer.register_step_pre_hook(before)
