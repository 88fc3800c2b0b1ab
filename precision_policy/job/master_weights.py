"""fp32 master weights of bf16 parameters, kept by the optimizers of ``torch.optim`` that the job has anyway.

An optimizer updates the parameter that it is given, in the parameter's dtype. Over bf16 parameters most small updates are
rounded away. Here, for the time of torch's own step, fp32 leaves stand in the optimizer; then the rounded weights go into the
model, and the 16 bits that rounding leaves over stay in the optimizer's state, as ``master_low_bits``. The model stays as it
is, in bf16, and remains the authority: whatever writes its weights between two steps is taken as it is at the next one.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from precision_policy.estimate import parameters
from precision_policy.job import low_bits, resume, swap, words
from precision_policy.job.events import Events, Listener
from precision_policy.job.pieces import LOW_BITS, WHOLE, Member, Piece, Scratch, cut, elements_of, scratch_for, scratch_on_cpu
from precision_policy.job.speaker import Speaker
from precision_policy.job.torch_states import Kind, base_of, kind_of
from precision_policy.job.whole_adam import WholeAdam

_STORED_WIDE: Final = "it is not stored in 16 bits"  # which nobody need be told


# On a GPU, many small parameters are worth keeping memory for: to lay out their pieces takes longer than to step them.
_KEPT_ELEMENTS: Final = 2**23


@dataclass(frozen=True)
class Kept:
    """What the last step of an optimizer did.

    Attributes:
        tensors: how many it stepped in fp32, by master weights that are kept.
        elements: of the whole parameters, all ranks taken together where their size is known.
        added_bytes: what keeping them adds on this rank: the low bits or whole fp32 copies, and fp32 states in place of bf16.
        refused: for each reason, in words, how many tensors of 16 bits were left without.
    """

    tensors: int
    elements: int
    added_bytes: int
    refused: dict[str, int]


class MasterWeights(Listener):
    """Steps bf16 parameters in fp32.

    Args:
        only: the optimizers to serve; None serves all.
    """

    def __init__(self, only: weakref.WeakSet[Optimizer] | None = None) -> None:
        self._only = only
        self._plans: weakref.WeakKeyDictionary[Optimizer, _Plan] = weakref.WeakKeyDictionary()
        self._loaded: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # Optimizers may be stepped by several threads: by the one of each GPU that runs a backward pass, say.
        self._lock = threading.RLock()
        self._scratch: Scratch | None = None
        self._undo_missing: Callable[[], None] | None = None

    def kept(self, optimizer: Optimizer) -> Kept | None:
        """What the last step of an optimizer did.

        An optimizer that has its step made by others, as ``ZeroRedundancyOptimizer`` does, is told what these did.

        Returns:
            None where no step of torch's came through: that of a class which updates parameters by itself.
        """
        if self._only is None and optimizer in _by_hand:
            return _kept_by_hand.kept(optimizer)
        plan = self._plans.get(optimizer)
        plans = {optimizer: plan} if plan is not None else self._plans_inside(optimizer)
        if not plans:
            return None
        tensors = elements = added = 0
        refused: Counter[str] = Counter()
        for stepped, plan in plans.items():
            refused += plan.refused
            for member in plan.members:
                tensors += 1
                elements += parameters.whole_size(member.param)
                added += _added_bytes(member, stepped.state.get(member.param, {}), plan.kind)
        return Kept(tensors, elements, added, dict(refused))

    def around_step(self, optimizer: Optimizer, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a closure first, with the model as it is; then step, with fp32 leaves in the place of bf16 parameters."""
        if not self._serves(optimizer):
            return step(optimizer, *args, **kwargs)
        refusal = _refusal(optimizer)
        if refusal is not None:
            result = step(optimizer, *args, **kwargs)
            plan = self._plans[optimizer] = _Plan.for_class(type(optimizer))
            plan.refused[refusal] = sum(param.dtype is torch.bfloat16 for param in _params(optimizer))
            return result
        closure = args[0] if args else kwargs.get("closure")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock, torch.no_grad():
            self._step(optimizer, step)
        return loss

    def around_load(self, optimizer: Optimizer, load: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Load a state without rounding what is kept in fp32."""
        if not self._serves(optimizer) or base_of(type(optimizer)) is None or _refusal(optimizer) is not None:
            return load(optimizer, *args, **kwargs)
        self._loaded.add(optimizer)
        with self._lock, resume.states_as_they_are(optimizer):
            return load(optimizer, *args, **kwargs)

    def end(self) -> None:
        """Let the optimizers that live on be torch's own: their states in the parameter's dtype, and no low bits."""
        for optimizer in {*self._plans, *self._loaded}:
            if self._serves(optimizer):
                resume.hand_back(optimizer)
        if self._undo_missing is not None:
            self._undo_missing()
            self._undo_missing = None
        self._plans.clear()
        self._loaded.clear()
        self._scratch = None

    def _serves(self, optimizer: Optimizer) -> bool:
        """Whether this one steps an optimizer. :func:`keep_master_weights` serves some beyond the end of a job."""
        if self._only is not None:
            return optimizer in self._only
        return optimizer not in _by_hand

    def _step(self, optimizer: Optimizer, step: Callable[..., Any]) -> None:
        """Step an optimizer whose closure has run: in one kernel where that can be, and piece by piece where not."""
        plan = self._plan(optimizer)
        self._plans[optimizer] = plan
        if not plan.members:
            step(optimizer)
            return
        if not plan.kind.by_tensor:
            swap.step_all(optimizer, step, plan.kind, _whole_pieces(plan.members))
            return
        if any(plan.rest):
            swap.step_rest(optimizer, step, plan.rest)
        if plan.whole_adam.can_step(optimizer, plan.members):
            others = plan.whole_adam.step(optimizer, plan.members)
            pieces_of_others = self._cut(others, plan.kind)
        else:
            pieces_of_others = self._pieces(plan)
        for pieces in pieces_of_others:
            if len(pieces) == 1:
                swap.step_piece(optimizer, step, plan.kind, pieces[0])
            else:
                swap.step_parts(optimizer, step, plan.kind, pieces)

    def _plan(self, optimizer: Optimizer) -> _Plan:
        """Sort the parameters that have a gradient into members and the rest. What was made for the last step is used again."""
        before = self._plans.get(optimizer)
        if before is None:
            if self._undo_missing is None:
                self._undo_missing = resume.let_low_bits_be_missing()
            before = _Plan.for_class(type(optimizer))
        elif before.is_for(optimizer.param_groups):
            return before
        known = {id(member.param): member for member in before.members}
        plan = _Plan(before.kind, before.whole_adam)
        occurrences = []
        for number, group in enumerate(optimizer.param_groups):
            rest = []
            plan.looks.append([_look_at(param) for param in group["params"]])
            for param in group["params"]:
                if param.grad is None:
                    continue
                refusal = _refusal_of(param, param.grad)
                if refusal is None:
                    member = known.get(id(param))
                    if member is None or not member.fits(param, number):
                        member = known[id(param)] = Member(param, number)
                    occurrences.append(member)
                    continue
                if refusal is not _STORED_WIDE:
                    plan.refused[refusal] += 1
                # torch steps it, and may find what master weights have left: a parameter may have been bf16 before.
                resume.to_param_dtype(optimizer, plan.kind, param)
                rest.append(param)
            plan.rest.append(rest)
        plan.members = list(dict.fromkeys(occurrences))
        plan.devices = {member.device for member in plan.members}
        for member, times in Counter(occurrences).items():
            member.times = times
        if plan.members == before.members:
            plan.pieces = before.pieces
        return plan

    def _pieces(self, plan: _Plan) -> list[list[Piece]]:
        """The pieces of a plan. They are used again where the memory in which they lie is kept.

        Those of a CUDA graph are its own: what they are stepped by depends on whether a graph is captured.
        """
        if any(_is_captured(device) for device in plan.devices):
            return self._cut(plan.members, plan.kind)
        if plan.pieces is None:
            pieces = self._cut(plan.members, plan.kind)
            if elements_of(plan.members) > _KEPT_ELEMENTS and any(device.type != "cpu" for device in plan.devices):
                return pieces
            plan.pieces = pieces
        return plan.pieces

    def _cut(self, members: Sequence[Member], kind: Kind) -> list[list[Piece]]:
        """The pieces of members: in memory that is kept on a CPU, and that is taken from torch's cache on other devices."""
        pieces: list[list[Piece]] = []
        for device, its in _by_device(members).items():
            if device.type == "cpu":
                self._scratch = self._scratch or scratch_on_cpu()
                pieces += cut(its, self._scratch, kind.elementwise)
            else:
                pieces += cut(its, scratch_for(its, device), kind.elementwise)
        return pieces

    def _plans_inside(self, optimizer: Optimizer) -> dict[Optimizer, _Plan]:
        """The plans of the optimizers that this one wraps: theirs are some of its parameters."""
        own = {id(param) for param in _params(optimizer)}
        found = {}
        for other, plan in self._plans.items():
            params = {id(param) for param in _params(other)}
            if params and params <= own:
                found[other] = plan
        return found


class _Look(NamedTuple):
    """What a plan depends on, of a parameter; ``grad_layout`` is None where it has no gradient."""

    param: torch.Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    grad_layout: torch.layout | None


def _look_at(param: torch.Tensor) -> _Look:
    grad_layout = None if param.grad is None else param.grad.layout
    return _Look(param, param.dtype, param.shape, param.stride(), param.device, grad_layout)


@dataclass
class _Plan:
    """How the parameters of an optimizer that have a gradient are stepped.

    Attributes:
        kind: what is known of the optimizer's step.
        whole_adam: makes that step where it is Adam's and nothing about it is unusual.
        members: those that are stepped by master weights.
        devices: where they are.
        rest: for each parameter group, those that torch steps as they are.
        refused: for each reason, how many of these are of 16 bits.
        pieces: of the members, where they can be used again.
        looks: what it was made from: for each parameter group, what was seen of its parameters.
    """

    kind: Kind
    whole_adam: WholeAdam
    members: list[Member] = field(default_factory=list)
    devices: set[torch.device] = field(default_factory=set)
    rest: list[list[torch.Tensor]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    pieces: list[list[Piece]] | None = None
    looks: list[list[_Look]] = field(default_factory=list)

    @classmethod
    def for_class(cls, kind: type[Optimizer]) -> _Plan:
        """An empty plan for an optimizer of this class."""
        known = kind_of(kind)
        return cls(known, WholeAdam(known))

    def is_for(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the parameters are as they were when the plan was made. It is asked at each step, so it is quick."""
        if len(groups) != len(self.looks):
            return False
        for group, looks in zip(groups, self.looks, strict=True):
            params = group["params"]
            if len(params) != len(looks):
                return False
            for param, look in zip(params, looks, strict=True):
                seen, dtype, shape, stride, device, grad_layout = look
                if param is not seen or param.dtype is not dtype:
                    return False
                grad = param.grad
                layout = None if grad is None else grad.layout
                if layout is not grad_layout:
                    return False
                # A DTensor's part is looked at when it is stepped.
                if param.shape != shape or param.stride() != stride or param.device != device:
                    return False
        return True


def _refusal(optimizer: Optimizer) -> str | None:
    """Why an optimizer is left to torch; None where it is served."""
    if isinstance(optimizer, LBFGS):
        return words.LBFGS_IS_ONE_VECTOR
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return words.DIFFERENTIABLE
    if any(isinstance(getattr(type(optimizer), name, None), property) for name in ("state", "param_groups")):
        return words.STATE_IS_A_PROPERTY
    return None


def _refusal_of(param: torch.Tensor, grad: torch.Tensor) -> str | None:
    """Why a parameter is left to torch; None where it gets a master weight."""
    dtype = param.dtype
    if dtype is torch.float16:
        return words.FP16
    if dtype is not torch.bfloat16:
        return _STORED_WIDE
    if grad.layout is not torch.strided:
        return words.SPARSE
    kind: Any = type(param)
    if kind is not nn.Parameter and type(parameters.local(param)).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return words.UNKNOWN_TENSOR
    return None


def _params(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _by_device(members: Iterable[Member]) -> dict[torch.device, list[Member]]:
    found: dict[torch.device, list[Member]] = {}
    for member in members:
        found.setdefault(member.device, []).append(member)
    return found


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _whole_pieces(members: Sequence[Member]) -> list[Piece]:
    """One piece for all members of a device."""
    pieces = []
    for device, its in _by_device(members).items():
        pieces.append(Piece(its, Scratch(elements_of(its), device), wraps=True))
    return pieces


def _added_bytes(member: Member, entry: Mapping[Any, Any], kind: Kind) -> int:
    """What a parameter's master weight adds on this rank."""
    added = 4 * member.size if member.keeps_whole else 2 * member.size
    for name, value in entry.items():
        if name in (LOW_BITS, WHOLE) or name in kind.numbers or not kind.makes(name, value):
            continue
        local = parameters.local(value)
        added += local.numel() * (local.element_size() - 2)
    return added


def keep_master_weights(optimizer: Optimizer) -> None:
    """Let an optimizer update its bf16 parameters in fp32 from now on, for as long as the process lives.

    For code that does not run under Hydra, or without ``+precision_policy=master_weights``. Call it when the optimizer has just
    been made: before a learning-rate scheduler is, and before a state is loaded.

    Args:
        optimizer: one of ``torch.optim``, or of a class that derives from one.

    Raises:
        TypeError: its step is not one of ``torch.optim``, or needs what cannot be kept: LBFGS, ``differentiable=True``.
        RuntimeError: a scheduler has taken the optimizer's step already.
    """
    kind = type(optimizer)
    if base_of(kind) is None:
        raise TypeError(f"keep_master_weights: {kind.__qualname__} is no optimizer of torch.optim")
    refusal = _refusal(optimizer)
    if refusal is not None:
        raise TypeError(f"keep_master_weights: {kind.__qualname__} cannot be served: {refusal}")
    with _by_hand_lock:
        _by_hand.add(optimizer)
        if not _by_hand_events.on:
            _by_hand_events.start()
        _by_hand_events.serve(kind)
    if not _by_hand_events.reaches(optimizer):
        _by_hand.discard(optimizer)
        raise RuntimeError(
            f"keep_master_weights: something has wrapped the step of this {kind.__qualname__} already, as a learning-rate "
            "scheduler does: call keep_master_weights(optimizer) before that"
        )


def fp32_weights(optimizer: Optimizer) -> dict[torch.Tensor, torch.Tensor]:
    """The weights of an optimizer in full precision, for an export.

    ``{name: weights[param] for name, param in model.named_parameters() if param in weights}`` is a state dict.

    Args:
        optimizer: any optimizer; the one inside where another makes its step, as ``ZeroRedundancyOptimizer(...).optim``.

    Returns:
        For each parameter a new fp32 tensor of its shape: the weight and its low bits joined where it has some, otherwise the
        weight as it is. Of a DTensor, a DTensor.
    """
    weights = {}
    with torch.no_grad():
        for param in _params(optimizer):
            member = Member(param, 0)
            low = None
            if param.dtype is torch.bfloat16:
                low, _ = swap.low_and_whole(optimizer, member)
            weights[param] = member.wrap(low_bits.joined(member.value.detach(), low))
    return weights


_by_hand: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_kept_by_hand = MasterWeights(_by_hand)
_by_hand_events = Events([_kept_by_hand], Speaker(), "precision_policy.keep_master_weights")
_by_hand_lock = threading.Lock()
