"""Adam's and AdamW's whole step in one kernel, where nothing about it is unusual: no fp32 copy of a weight or gradient is made.

It needs 26 bytes an element to be read or written, where torch's own step between a join and a split needs 50. The state is
the one that torch's step makes, so a checkpoint goes on by either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.optim import Adam, AdamW, Optimizer

from precision_policy.job import swap
from precision_policy.job.pieces import LOW_BITS, Member, grad_of, kernels_on, note_writes
from precision_policy.job.torch_states import Kind, base_of

_ENOUGH_FOR_A_LAUNCH: Final = 2**24  # elements: some 0.15 ms on an H100


@dataclass
class _Row:
    """What the kernel reads and writes of one parameter.

    Attributes:
        member: the parameter.
        value: this rank's part of it.
        low: the low bits.
        exp_avg: the first moment.
        exp_avg_sq: the second moment.
        step: how many steps were made, as torch counts them.
        count: the same as a number, for which no device need be asked.
        version: of ``step``, when it was that number: torch counts what is done to a tensor, but not through its ``data``.
        found: the entries of its state when the row was made. Where they are the same ones, the row holds still.
        grad: this rank's part of the gradient, for the time of the step.
    """

    member: Member
    value: torch.Tensor
    low: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    count: float = 0.0
    version: int = -1
    found: tuple[Any, ...] = ()
    grad: torch.Tensor | None = None


class WholeAdam:
    """Steps the members of one optimizer; what it makes for them is used again at the next step.

    Args:
        kind: what is known of the optimizer's step.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._members: Sequence[Member] = ()
        self._groups: set[int] = set()
        self._devices: set[torch.device] = set()
        self._has_unusual = False

    def can_step(self, optimizer: Optimizer, members: Sequence[Member]) -> bool:
        """Whether this is the plain case, on a device on which the kernels run."""
        if base_of(type(optimizer)) not in (Adam, AdamW) or not self._kind.by_tensor:
            return False
        # A fused optimizer under a GradScaler unscales its gradients, and may skip its step.
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            return False
        if members is not self._members:
            self._members = members
            self._groups = {member.group for member in members}
            self._devices = {member.device for member in members}
            self._has_unusual = any(member.keeps_whole or member.times > 1 for member in members)
        if self._has_unusual or not all(_is_plain(optimizer.param_groups[number]) for number in self._groups):
            return False
        return all(kernels_on(device) is not None for device in self._devices)

    def step(self, optimizer: Optimizer, members: Sequence[Member]) -> list[Member]:
        """Step the members, and give back those that must be stepped in another way."""
        others = []
        waiting: dict[tuple[int, torch.device, float], list[_Row]] = {}
        elements = launched = 0
        for member in members:
            grad = grad_of(member) if member.is_shard else member.param.grad
            row = self._row(optimizer, member)
            if row is None or grad is None or not member.is_dense or grad.dtype is not torch.bfloat16:
                others.append(member)
                continue
            if grad.stride() != member.stride:
                grad = member.lay(grad, torch.bfloat16)
            row.grad = grad
            if row.step.is_cpu or row.step._version != row.version:
                row.count = float(row.step.item())
            waiting.setdefault((member.group, member.device, row.count), []).append(row)
            elements += member.size
            # The device shall begin soon, and be busy while the next launch is made ready: each is as large as all before it.
            if elements >= max(_ENOUGH_FOR_A_LAUNCH, launched):
                self._launch_all(optimizer, waiting)
                launched += elements
                elements = 0
        self._launch_all(optimizer, waiting)
        return others

    def _launch_all(self, optimizer: Optimizer, waiting: dict[tuple[int, torch.device, float], list[_Row]]) -> None:
        while waiting:
            (number, device, count), rows = waiting.popitem()
            self._launch(optimizer, optimizer.param_groups[number], device, count + 1, rows)

    def _launch(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        device: torch.device,
        count: float,
        rows: Sequence[_Row],
    ) -> None:
        """Make a step, ``count`` in number, of parameters of one group and one device.

        Only what cannot fail comes after the kernel was started.
        """
        beta1, beta2 = group["betas"]
        values = [row.value for row in rows]
        steps = [row.step for row in rows]
        # Counted first: where the kernel cannot be started, for want of memory say, that is taken back.
        torch._foreach_add_(steps, 1)
        try:
            kernels_on(device).adam(
                values,
                [row.low for row in rows],
                [row.grad for row in rows],
                [row.exp_avg for row in rows],
                [row.exp_avg_sq for row in rows],
                count=count,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                decoupled=group.get("decoupled_weight_decay", base_of(type(optimizer)) is AdamW),
                fused=bool(group.get("fused")),
            )
        except BaseException:
            torch._foreach_sub_(steps, 1)
            raise
        note_writes(values)
        for row in rows:
            row.count, row.version = count, row.step._version
            row.grad = None
            if row.member.row is not row:
                self._keep(optimizer, row.member, row)

    def _keep(self, optimizer: Optimizer, member: Member, row: _Row) -> None:
        """Make a new row's tensors the parameter's state."""
        made = {"step": row.step, "exp_avg": row.exp_avg, "exp_avg_sq": row.exp_avg_sq}
        swap.put_back(optimizer, member, self._kind, made, row.low)
        row.found = _entries(optimizer.state[member.param])
        member.row = row

    def _row(self, optimizer: Optimizer, member: Member) -> _Row | None:
        """The row of a member; None where its state is not the one that Adam makes."""
        state = optimizer.state.get(member.param)
        known: _Row | None = member.row
        if known is not None and state is not None and known.value is member.value:
            low_bits, exp_avg, exp_avg_sq, step = known.found
            is_same = state.get(LOW_BITS) is low_bits and state.get("exp_avg") is exp_avg
            if is_same and state.get("exp_avg_sq") is exp_avg_sq and state.get("step") is step:
                return known
        entry: dict[Any, Any] = swap.entry_for_leaf(optimizer, member, self._kind)
        low, own = swap.kept_of(optimizer, member)
        if low is None:
            own.zero_()
        if not entry:
            is_fused = optimizer.param_groups[member.group].get("fused")
            step = torch.zeros((), dtype=torch.float32, device=member.device if is_fused else "cpu")
            exp_avg = member.new(torch.float32).zero_()
            exp_avg_sq = member.new(torch.float32).zero_()
            return _Row(member, member.value, own, exp_avg, exp_avg_sq, step)
        found = [entry.get(name) for name in ("exp_avg", "exp_avg_sq", "step")]
        tensors = [value for value in found if torch.is_tensor(value) and value.dtype is torch.float32]
        if len(tensors) < len(found):
            return None
        exp_avg, exp_avg_sq, step = tensors
        if exp_avg.shape != member.shape or exp_avg_sq.shape != member.shape or step.numel() != 1:
            return None
        return _Row(member, member.value, own, exp_avg, exp_avg_sq, step)


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether a parameter group asks for nothing that the kernel does not do."""
    if any(group.get(name) for name in ("amsgrad", "maximize", "capturable", "differentiable")):
        return False
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return all(isinstance(number, (int, float)) for number in numbers)


def _entries(state: dict[Any, Any]) -> tuple[Any, ...]:
    """The entries of a parameter's state that a row is made of."""
    return state.get(LOW_BITS), state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step")
