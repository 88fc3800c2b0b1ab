"""The watch on optimizers: while a job runs, each one is judged as soon as its parameter groups exist.

Armed, it costs a look at each optimizer when it is constructed and again before its first step. Later steps pay for one call
that finds nothing to do. ``torch.optim.Optimizer`` has no hook for construction, so its ``__init__`` is wrapped for the time
of the job: every optimizer that a config, plain code or a library builds comes through there.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_policy.job import compute, message, optimizers, ranks
from precision_policy.job.plan import Plan
from precision_policy.job.speaker import Speaker
from precision_policy.job.wrapping import wrap
from precision_policy.record import Decision, Record

_LOG = logging.getLogger("precision_policy")

# Reading every dtype of 10,000 parameters takes a tenth of the time that constructing their optimizer takes. Of a larger
# group than the first number, construction looks at about the second number, evenly spread; the first step looks at all.
_LOOKS_AT_ALL, _LOOKS_AT = 512, 64


class Bf16AdamError(RuntimeError):
    """Raised instead of the warning under ``precision_policy=strict``."""

    def __repr__(self) -> str:
        # hydra.utils.instantiate shows an error by its repr, which would run the lines together.
        return f"{type(self).__name__}: {self}"


class Watch:
    """Judges each optimizer once, and says so once per job.

    Args:
        plan: what to look for and what to say.
        said: what was said already, by a watch that this one goes on for.
        advise: finds the line to paste for a compensating optimizer, tried.
    """

    def __init__(self, plan: Plan, said: Iterable[str] = (), advise: Callable[[Optimizer], str | None] | None = None) -> None:
        self.plan = plan
        self.said = set(said)
        self.armed = False
        self._advise = advise
        self._lock = threading.Lock()
        # By number. One that is gone may leave it to another, which starts anew: see where an optimizer is constructed.
        self._before_first_step: set[int] = set()
        self._warned: set[int] = set()
        self._first_steps: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._confirmed: set[tuple[Any, ...]] = set()
        self._compute = compute.Compute(_record(plan), Speaker(said), plan.option)
        self._undo: list[Callable[[], None]] = []

    def arm(self) -> None:
        """Begin to judge the optimizers that are constructed from now on."""
        unwrap = wrap(Optimizer, "__init__", self._construct)
        before = register_optimizer_step_pre_hook(self._before_step)
        after = register_optimizer_step_post_hook(self._after_step)
        self._undo = [self._compute.end, before.remove, after.remove, unwrap]
        self.armed = True

    def _construct(self, init: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        init(optimizer, *args, **kwargs)
        if self.armed:
            self._guarded(self._at_construction, optimizer)

    def disarm(self) -> None:
        """Leave torch as it was."""
        self.armed = False
        while self._undo:
            self._guarded(self._undo.pop())

    def _guarded(self, look: Callable[..., None], *args: Any) -> None:
        """A diagnosis must not end a job, except by the error that ``strict`` asks for."""
        try:
            look(*args)
        except Bf16AdamError:
            raise
        except Exception:
            text = f"{self.plan.option}: an optimizer could not be judged; the job goes on"
            self._say_once("failed", logging.WARNING, lambda: text, exc_info=True)

    def _at_construction(self, optimizer: Optimizer) -> None:
        self._before_first_step.add(id(optimizer))
        self._warned.discard(id(optimizer))
        if self.plan.confirms:
            self._first_steps.add(optimizer)
            self._compute.made(optimizer)
        known = optimizers.look_up(optimizer)
        if known is None or known.engine_owned or self.plan.action not in ("warn", "error"):
            return
        if _may_hold_low_precision(optimizer):
            # An engine that is loaded may swap in fp32 copies before the first step: an error waits for that.
            if self.plan.action == "warn" or not optimizers.engine_is_loaded():
                self._judge(optimizer, known)
        elif known.keeps(optimizer, torch.bfloat16) == "master":
            self._say_once("wasted", logging.INFO, lambda: message.wasted(optimizer, self.plan))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._before_first_step:
            self._before_first_step.discard(id(optimizer))
            self._guarded(self._at_first_step, optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # After and not before: a closure, as Lightning passes one, computes the first gradients within the step.
        if optimizer in self._first_steps:
            self._first_steps.discard(optimizer)
            self._guarded(self._confirm, optimizer)

    def _at_first_step(self, optimizer: Optimizer) -> None:
        """Parameters may have been added, recast, or swapped for fp32 copies by an engine since construction."""
        known = optimizers.look_up(optimizer)
        if self.plan.action == "count":
            self._say_once("holds", logging.INFO, lambda: message.holds(optimizer, self.plan))
        elif known is not None and self.plan.action != "ignore":
            if id(optimizer) not in self._warned:
                self._judge(optimizer, known)
            elif not message.low_precision(optimizer):
                self._say_once("taken back", logging.INFO, lambda: message.taken_back(optimizer, self.plan))
            self._warned.discard(id(optimizer))

    def _judge(self, optimizer: Optimizer, known: optimizers.Known) -> None:
        low = message.low_precision(optimizer)
        if not low or known.keeps(optimizer, torch.bfloat16) != "nothing":
            return
        self._warned.add(id(optimizer))
        first, strict = self._first_time("warning"), self.plan.action == "error"
        if not (first or strict):
            return
        warning = message.warning(optimizer, known, low, self.plan, self._other_way(optimizer))
        if first:
            level = logging.ERROR if strict else logging.INFO if warning.nearly_nothing else logging.WARNING
            _LOG.log(level, warning.text)
        if strict:
            raise Bf16AdamError(f"{warning.short}{'; the schedule will get there' if warning.nearly_nothing else ''}")

    def _other_way(self, optimizer: Optimizer) -> str | None:
        if self._advise is None or self.plan.asked:
            return None
        try:
            return self._advise(optimizer)
        except Exception:  # whatever refuses it, the line is not one to show
            return None

    def _confirm(self, optimizer: Optimizer) -> None:
        """Say what the weights are stored and computed in."""
        computed = self._compute.answer(optimizer)
        self._compute.stepped(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not any(p.dtype is torch.float32 for p in params) or not ranks.is_rank_zero():
            return
        signature = (frozenset(p.dtype for p in params), computed)
        if signature not in self._confirmed:
            self._confirmed.add(signature)
            _LOG.info(message.confirmed(optimizer, self.plan, computed.dtype, computed.by))

    def _first_time(self, what: str) -> bool:
        """Whether this is to be said: once per job, on rank zero."""
        with self._lock:
            if what in self.said:
                return False
            self.said.add(what)
        return ranks.is_rank_zero()

    def _say_once(self, what: str, level: int, text: Callable[[], str | None], **kwargs: Any) -> None:
        """Log on rank zero, once per job. The text is made only then: it may read the weights."""
        if self._first_time(what):
            told = text()
            if told is not None:
                _LOG.log(level, told, **kwargs)


def _may_hold_low_precision(optimizer: Optimizer) -> bool:
    # element_size is cheaper than dtype, which has to ask whether the tensor overrides it.
    return any(2 in map(torch.Tensor.element_size, _some(group["params"])) for group in optimizer.param_groups)


def _some(params: list[torch.Tensor]) -> list[torch.Tensor]:
    if len(params) <= _LOOKS_AT_ALL:
        return params
    # Two strides without a common factor: layers repeat, and one stride alone could meet nothing but their biases.
    stride = 2 * len(params) // _LOOKS_AT
    return params[::stride] + params[1 :: stride + 1]


def _record(plan: Plan) -> Record:
    """What the plan says, as the record that it will be replaced by."""
    rules: list[Any] = ["set", "peft"] if plan.leaves_some_alone else ["set"]
    decisions = tuple(Decision(rule, None, None, None, "", loads_checkpoint_dtype=plan.set_over_checkpoint) for rule in rules)
    return Record(True, False, plan.compute_dtype, "warn", plan.sample, plan.monitor, decisions)
