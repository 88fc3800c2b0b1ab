"""What weights are computed in, and by whom: seen where their modules are called, supplied where that was asked for."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from precision_policy.job import autocast, words
from precision_policy.job.events import Listener
from precision_policy.job.gradients import FirstGradients
from precision_policy.job.owners import Owners
from precision_policy.job.speaker import Speaker
from precision_policy.record import FROZEN_BASE, Decision, Record


@dataclass(frozen=True)
class Computed:
    """What is known of the compute of an optimizer's fp32 parameters.

    Attributes:
        dtype: "bf16", "fp16", either of them "at least in part", or None where that is not known.
        by: what supplies that dtype, or, where the dtype is not known, what the model was called under; None where neither is
            known, or where the gradients show a dtype that nobody was seen to supply.
    """

    dtype: str | None
    by: str | None


class _Owner:
    """What was seen of a module that is called and owns parameters of an optimizer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        # Weakly, by number: what is asked later is whether the very same parameter is there.
        self._own: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self.precision: autocast.Precision | None = None
        self.left_alone = False
        self.obstacle: autocast.Obstacle | None = None
        self.saw_autocast = False
        self.call: autocast.Call | None = None
        # Optimizers over its parameters that have not stepped yet, as far as they were looked for.
        self.awaited: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def add(self, own: Iterable[torch.Tensor]) -> None:
        self._own.update((id(p), p) for p in own)

    def owns(self, param: torch.Tensor) -> bool:
        return self._own.get(id(param)) is param

    def names(self) -> list[str]:
        """What it was called under."""
        if self.precision is not None:
            return [self.precision.name]
        names = []
        if self.saw_autocast or (self.call is not None and self.call.saw_autocast):
            names.append(words.APPLICATIONS)
        if self.call is not None and self.call.has_supplied:
            names.append(words.POLICYS)
        return names or [words.LEFT_ALONE if self.left_alone else words.NOBODY]


class Compute(Listener):
    """Follows each optimizer until its first step, and supplies bf16 autocast where the settings ask for it.

    Args:
        record: the job's settings and decisions.
        speaker: says the warnings.
        option: how the option that is on is called.
    """

    def __init__(self, record: Record, speaker: Speaker, option: str) -> None:
        self._speaker = speaker
        self._option = option
        self._supplies = record.compute_dtype is not None and not all(map(_wants_no_fp32, record.decisions))
        self._compute_dtype = record.compute_dtype or ""
        frozen = [decision.rule in FROZEN_BASE for decision in record.decisions]
        self._leaves_some_alone = any(frozen) and not all(frozen)
        self._set_over_checkpoint = any(map(_set_over_checkpoint, record.decisions))
        self._autocast = autocast.Autocast()
        self._owners = Owners(self._found, self._guarded)
        self._seen: list[_Owner] = []
        # Until the first step.
        self._gradients: weakref.WeakKeyDictionary[Optimizer, FirstGradients] = weakref.WeakKeyDictionary()
        self._answers: weakref.WeakKeyDictionary[Optimizer, Computed] = weakref.WeakKeyDictionary()

    def made(self, optimizer: Optimizer) -> None:
        """Look for the owners of its parameters, and at its first gradients."""
        self._gradients[optimizer] = FirstGradients(optimizer)
        self._owners.follow(optimizer)

    def stepped(self, optimizer: Optimizer) -> None:
        """At the first step: say what is slow or was not supplied, and look no longer.

        After the step and not before it: a closure, as Lightning passes one, computes the first gradients within the step.
        """
        if optimizer not in self._gradients:
            return
        computed = self.answer(optimizer)
        del self._gradients[optimizer]
        self._owners.forget(optimizer)
        params = _trainable(optimizer)
        for owner in self._owners_of(params):
            owner.awaited.discard(optimizer)
            if owner.call is not None and not self._is_awaited(owner):
                self._note_no_longer(owner, owner.call)
        fp32 = _in_fp32(params)
        if fp32 and computed.dtype is None:
            self._say_what_it_costs(self._owners_of(fp32), computed, fp32[0].device)

    def answer(self, optimizer: Optimizer) -> Computed:
        """What its fp32 parameters are computed in, as far as it is known; asked once the first gradients are there."""
        if optimizer not in self._answers:
            self._answers[optimizer] = self._answer(optimizer)
        return self._answers[optimizer]

    def modules(self, optimizer: Optimizer) -> list[nn.Module]:
        """The outermost modules that were called and own some of its parameters."""
        modules = [owner.module() for owner in self._owners_of(_trainable(optimizer))]
        return [module for module in modules if module is not None]

    def end(self) -> None:
        """Leave torch, the modules and the parameters as they were."""
        self._owners.stop()
        self._autocast.stop()
        for gradients in self._gradients.values():
            gradients.close()

    def _found(self, module: nn.Module, own: Sequence[torch.Tensor], in_graph: bool) -> None:
        """Decide about a module that is about to be called."""
        owner = self._owner(module)
        owner.add(own)
        fp32 = _in_fp32(own)
        if not fp32:
            return
        device_type = fp32[0].device.type
        owner.saw_autocast |= torch.is_autocast_enabled(device_type)
        owner.precision = autocast.own_precision(module)
        if owner.precision is not None:
            owner.obstacle = owner.precision.obstacle
            return
        owner.left_alone = self._leaves_some_alone and any(not p.requires_grad for p in module.parameters())
        if self._supplies and not owner.left_alone:
            owner.obstacle = autocast.find_obstacle(module, device_type)
            if owner.obstacle is None:
                # Also where the application autocasts this very call. It need not autocast all of them: an evaluation that
                # forgets to would compute other numbers than the training did, and slowly. Where the application has entered
                # autocast, the policy's does nothing. `autocast(enabled=False)` around the model is not seen, so the policy's
                # autocast is entered anyway; inside the model it works.
                owner.call = self._autocast.supply(module, device_type)
                owner.call.has_supplied |= in_graph and not torch.is_autocast_enabled(device_type)
                return
        if not owner.saw_autocast and not in_graph:
            # A later call may be under autocast: an evaluation before the training often is not. In a function that is being
            # compiled, what notes it would become a part of the graph, and the function would be compiled anew without it.
            owner.call = self._autocast.note(module, device_type)

    def _owner(self, module: nn.Module) -> _Owner:
        """The one for this module. A further optimizer over the same model finds it again."""
        self._seen = [owner for owner in self._seen if owner.module() is not None]
        for owner in self._seen:
            if owner.module() is module:
                return owner
        self._seen.append(_Owner(module))
        return self._seen[-1]

    def _owners_of(self, params: Sequence[torch.Tensor]) -> list[_Owner]:
        """The owners of any of these parameters."""
        return [owner for owner in self._seen if any(map(owner.owns, params))]

    def _is_awaited(self, owner: _Owner) -> bool:
        """Whether an optimizer over some of its parameters has not stepped yet.

        They are looked for where none is known, and not at each step: there may be an optimizer for each parameter, which steps
        in the backward pass.
        """
        if not owner.awaited:
            for optimizer in self._gradients:
                if any(map(owner.owns, _trainable(optimizer))):
                    owner.awaited.add(optimizer)
        return len(owner.awaited) > 0

    def _note_no_longer(self, owner: _Owner, call: autocast.Call) -> None:
        """Keep what its calls were seen under, and look at no further one; a call that supplies autocast goes on doing so."""
        owner.saw_autocast |= call.saw_autocast
        if call.supplies:
            call.notes = False
        else:
            self._autocast.take_away(call)
            owner.call = None

    def _answer(self, optimizer: Optimizer) -> Computed:
        """Put together what the first gradients tell and what the owners were called under."""
        gradients = self._gradients.get(optimizer)
        seen = None if gradients is None else gradients.read()
        params = _in_fp32(_trainable(optimizer))
        if not params:
            return Computed(None, None)
        owners = self._owners_of(params)
        dtype = _named_dtype(owners) or seen
        names: list[str] = []
        for owner in owners:
            names += owner.names()
        by = dict.fromkeys(names)
        if dtype is not None:
            by.pop(words.NOBODY, None)
        return Computed(dtype, " and ".join(by) or None)

    def _say_what_it_costs(self, owners: list[_Owner], computed: Computed, device: torch.device) -> None:
        """Warn of fp32 weights that were called under nothing, where 16 bits were asked for or would be fast."""
        obstacles = [owner.obstacle for owner in owners if owner.obstacle is not None and not owner.saw_autocast]
        if self._supplies and not owners:
            text = words.not_called(self._option, self._compute_dtype, device.type)
            self._speaker.say_once("not called", logging.WARNING, text)
        elif self._supplies and obstacles:
            text = words.not_supplied(self._option, self._compute_dtype, obstacles[0].why, obstacles[0].fix)
            self._speaker.say_once("not supplied", logging.WARNING, text)
        elif self._set_over_checkpoint and computed.by == words.NOBODY:
            name = bf16_device(device)
            if name is not None:
                text = words.slow(self._option, name, device.type, multiplies_in_tf32(device))
                self._speaker.say_once("slow", logging.WARNING, text)

    def _guarded(self, call: Callable[..., None], *args: object) -> None:
        """What is done in a call of the application's must not end it."""
        try:
            call(*args)
        except Exception:
            text = f"{self._option}: it could not be told what a model is computed in; the job goes on"
            self._speaker.say_once("failed to look", logging.WARNING, text, exc_info=True)


def _named_dtype(owners: Iterable[_Owner]) -> str | None:
    """The dtype that the mixed precision of these models names; None where it names none, or not the same for all."""
    dtypes = {None if owner.precision is None else owner.precision.dtype for owner in owners}
    return dtypes.pop() if len(dtypes) == 1 else None


def _set_over_checkpoint(decision: Decision) -> bool:
    """Whether fp32 was set for a model that would have been loaded in its checkpoint's dtype."""
    return decision.rule == "set" and decision.loads_checkpoint_dtype


def _wants_no_fp32(decision: Decision) -> bool:
    """Whether a decision is about a model that the policy leaves alone, or that the config wants in 16 bits."""
    return decision.rule in FROZEN_BASE or (decision.rule == "explicit_dtype" and not decision.fp32)


def _trainable(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _in_fp32(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p for p in params if p.dtype is torch.float32]


def multiplies_in_tf32(device: torch.device) -> bool:
    """Whether torch multiplies fp32 matrices in TF32 on a device, by its own switch."""
    if device.type != "cuda":
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch 2.9 and later refuse to tell when both its old and its new switches were used
        return False


def bf16_device(device: torch.device) -> str | None:
    """The name of a device that has matrix units for bf16; None for one that has none, a CPU included."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.get_device_capability(device) >= (8, 0) else None
    supported = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    return device.type if device.type != "cpu" and supported is not None and supported() else None
