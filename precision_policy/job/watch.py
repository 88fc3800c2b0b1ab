"""The watch on optimizers: while a job runs, each one is judged as soon as its parameter groups exist.

Armed, it costs a look at each optimizer when it is constructed and again before its first step. Later steps pay for one call
that finds nothing to do. ``torch.optim.Optimizer`` has no hook for construction, so its ``__init__`` is wrapped for the time
of the job: every optimizer that a config, plain code or a library builds comes through there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_policy.estimate import parameters
from precision_policy.job import compute_dtype, message, optimizers, ranks
from precision_policy.job.plan import Plan
from precision_policy.job.wrapping import wrap

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
    """

    def __init__(self, plan: Plan, said: Iterable[str] = ()) -> None:
        self.plan = plan
        self.said = set(said)
        self.armed = False
        self._lock = threading.Lock()
        # By number. One that is gone may leave it to another, which starts anew: see where an optimizer is constructed.
        self._before_first_step: set[int] = set()
        self._warned: set[int] = set()
        self._probes: dict[int, compute_dtype.Probe] = {}
        self._confirmed: set[tuple[Any, ...]] = set()
        self._supply = compute_dtype.Supply()
        self._owners = compute_dtype.Owners(self._owner_found, self._guarded)
        # Who supplies the compute dtype of a parameter whose module was called, until its optimizer steps.
        self._suppliers: dict[int, tuple[str, str | None]] = {}
        self._undo: list[Callable[[], None]] = []

    def arm(self) -> None:
        """Begin to judge the optimizers that are constructed from now on."""
        unwrap = wrap(Optimizer, "__init__", self._construct)
        before = register_optimizer_step_pre_hook(self._before_step)
        after = register_optimizer_step_post_hook(self._after_step)
        self._undo = [self._supply.stop, self._owners.stop, self._close_probes, before.remove, after.remove, unwrap]
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

    def _close_probes(self) -> None:
        while self._probes:
            self._probes.popitem()[1].close()

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
            self._follow_compute(optimizer)
        known = optimizers.look_up(optimizer)
        if known is None or known.engine_owned or self.plan.action not in ("warn", "error"):
            return
        if _may_hold_low_precision(optimizer):
            # An engine that is loaded may swap in fp32 copies before the first step: an error waits for that.
            if self.plan.action == "warn" or not optimizers.engine_is_loaded():
                self._judge(optimizer, known)
        elif known.keeps(optimizer, torch.bfloat16) == "master":
            self._say_once("wasted", logging.INFO, lambda: message.wasted(optimizer, self.plan))

    def _follow_compute(self, optimizer: Optimizer) -> None:
        self._probes[id(optimizer)] = compute_dtype.Probe(optimizer)
        # Reading every dtype costs a tenth of the construction, so not without need. The first parameter tells of shards.
        sharded = compute_dtype.is_sharded(optimizer.param_groups[0]["params"][:1])
        asks_whose = sharded or self.plan.leaves_some_alone or self.plan.compute_dtype is not None
        if asks_whose or self._suppliers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for p in params:
                self._suppliers.pop(id(p), None)
            if asks_whose:
                self._owners.follow(parameters.trainable(params, (torch.float32,)))

    def _owner_found(self, module: nn.Module, params: list[nn.Parameter]) -> None:
        if params[0].dtype is not torch.float32:  # an engine has recast the module since
            return
        device_type = params[0].device.type
        supplier = compute_dtype.supplier(module, device_type)
        if self.plan.leaves_some_alone and any(not p.requires_grad for p in module.parameters()):
            supplier = supplier or (compute_dtype.LEFT_ALONE, None)
        elif self.plan.compute_dtype is not None and (supplier is None or supplier[1] is None):
            supplier = supplier or ("autocast that the policy supplies", None)
            for one in compute_dtype.with_what_it_wraps(module):
                self._supply.to(one, device_type)
        self._suppliers.update(dict.fromkeys(map(id, params), supplier or (compute_dtype.NOBODY, None)))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._before_first_step:
            self._before_first_step.discard(id(optimizer))
            self._guarded(self._at_first_step, optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # After and not before: a closure, as Lightning passes one, computes the first gradients within the step.
        if id(optimizer) in self._probes:
            self._guarded(self._confirm, optimizer, self._probes.pop(id(optimizer)))

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
        warning = message.warning(optimizer, known, low, self.plan)
        if first:
            level = logging.ERROR if strict else logging.INFO if warning.nearly_nothing else logging.WARNING
            _LOG.log(level, warning.text)
        if strict:
            raise Bf16AdamError(f"{warning.short}{'; the schedule will get there' if warning.nearly_nothing else ''}")

    def _confirm(self, optimizer: Optimizer, probe: compute_dtype.Probe) -> None:
        """Say what the weights are stored and computed in, and where that makes the run slow, how to mend it."""
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        seen = probe.read()
        by, says = self._supplier_of(optimizer)
        # These were trained without a call of a module that owns them: to wait for one would slow each call of any module.
        self._owners.forget(p for p in params if p.grad is not None)
        if not any(p.dtype is torch.float32 for p in params) or not ranks.is_rank_zero():
            return
        device = params[0].device
        computed = compute_dtype.fp32_or_tf32(says or seen, device)
        in_fp32 = computed in ("fp32", "TF32")
        # Where the gradients do not tell, that nobody was seen to supply 16 bits is worth saying; else it means nothing.
        nobody = by == compute_dtype.NOBODY
        by_whom = None if in_fp32 or (nobody and computed) else by
        signature = (frozenset(p.dtype for p in params), computed, by_whom)
        if signature not in self._confirmed:
            self._confirmed.add(signature)
            _LOG.info(message.confirmed(optimizer, self.plan, computed, by_whom))
        if by != compute_dtype.LEFT_ALONE and (in_fp32 or (nobody and computed is None)):
            self._say_what_it_costs(computed, device, by)

    def _supplier_of(self, optimizer: Optimizer) -> tuple[str | None, str | None]:
        """Who supplies the compute dtype of an optimizer's parameters, and what that is where it says so."""
        every = [self._suppliers.pop(id(p), None) for group in optimizer.param_groups for p in group["params"]]
        found = dict.fromkeys(one for one in every if one is not None)
        says = {dtype for _, dtype in found}
        return " and ".join(name for name, _ in found) or None, says.pop() if len(says) == 1 else None

    def _say_what_it_costs(self, computed: str | None, device: torch.device, by: str | None) -> None:
        if self.plan.compute_dtype is not None and computed is not None:
            self._say_once("not supplied", logging.WARNING, lambda: message.not_supplied(self.plan, computed, by))
        elif self.plan.set_over_checkpoint:
            name = compute_dtype.bf16_device(device)
            if name is not None:
                self._say_once("slow", logging.WARNING, lambda: message.slow(self.plan, computed, name, device.type))

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
