"""What an optimizer holds and what its updates lose, in numbers; ``words.py`` makes sentences of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch.optim import Optimizer

from precision_policy.estimate import histogram, parameters
from precision_policy.job import optimizers
from precision_policy.job.optimizers import Known

NEARLY_NOTHING: Final = 0.01
"""A share of lost updates, 0 to 1, under which nobody needs a warning."""

DECAY_LIMIT: Final = 2.0**-9
"""Half a bf16 step, relative to the largest weight of an exponent: a smaller change moves no weight at all."""

BYTES_OF_LOW_BITS: Final = 2
"""The bytes for each element that master weights keep beside a bf16 parameter."""

_USUAL_RATE: Final = 1e-5  # shown where a schedule begins at 0 and the group does not tell where it leads


@dataclass(frozen=True)
class Amount:
    """So many tensors.

    Attributes:
        tensors: how many.
        elements: of the whole tensors, also where this rank has a shard of them.
        partly: whether some are counted by this rank's shard alone, as the size of their whole is not known.
    """

    tensors: int
    elements: int
    partly: bool = False

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tensors + other.tensors, self.elements + other.elements, self.partly or other.partly)


@dataclass(frozen=True)
class Bf16Group:
    """The trainable bf16 parameters of one parameter group.

    Attributes:
        group: the group.
        params: those parameters.
        names: their names, where the optimizer was given any.
    """

    group: dict[str, Any]
    params: list[torch.Tensor]
    names: list[str]


@dataclass(frozen=True)
class Row:
    """One kind of parameter.

    Attributes:
        kind: one of :data:`parameters.KINDS`.
        elements: how many.
        now: the share, 0 to 1, that an update of size lr cannot move.
        tenth: the share that an update of a tenth of it cannot move.
    """

    kind: str
    elements: int
    now: float
    tenth: float


@dataclass(frozen=True)
class Loss:
    """The share of updates that rounding drops.

    Attributes:
        rows: by kind of parameter.
        rate: the learning rate that all groups have, or None where they differ.
        rate_is: whether it is that of the groups, the one that a warm-up leads to, or assumed where the groups have 0.
        sampled: whether it was read from an even sample.
        of_shard: whether it was read from this rank's shard.
        loses_a_tenth: the rate under which a tenth of the updates is lost; 0.0 if there is none.
    """

    rows: list[Row]
    rate: float | None
    rate_is: Literal["current", "initial", "assumed"]
    sampled: bool
    of_shard: bool
    loses_a_tenth: float

    @property
    def now(self) -> float:
        """The share over all kinds, 0 to 1."""
        return sum(row.now * row.elements for row in self.rows) / sum(row.elements for row in self.rows)

    @property
    def tenth(self) -> float:
        """The same at a tenth of the learning rate."""
        return sum(row.tenth * row.elements for row in self.rows) / sum(row.elements for row in self.rows)

    @property
    def is_nearly_nothing(self) -> bool:
        """Whether next to nothing is lost, now and at a tenth of the learning rate."""
        return max(self.now, self.tenth) < NEARLY_NOTHING


@dataclass(frozen=True)
class Decay:
    """In how many of the groups with decoupled weight decay it is too small to move any bf16 weight.

    Attributes:
        without_effect: in so many.
        groups: of so many.
        most: the largest lr * weight_decay among them.
    """

    without_effect: int
    groups: int
    most: float


@dataclass(frozen=True)
class Cost:
    """What bf16 parameters would take in addition, in bytes on this rank.

    Attributes:
        weights: for weights in fp32.
        gradients: for gradients in fp32.
        state: for the optimizer's states in fp32; None where these were not counted.
        low_bits: for what master weights keep beside bf16 parameters.
        sharded: whether this rank has only a part of the parameters.
    """

    weights: int
    gradients: int
    state: int | None
    low_bits: int
    sharded: bool


@dataclass(frozen=True)
class Holding:
    """An optimizer over bf16 parameters.

    Attributes:
        optimizer: its class, as its users know it.
        served: whether master weights can be kept for it, as far as its class and groups tell.
        amount: its trainable bf16 parameters.
        known_size: whether the size of its first update is known.
        loss: what its updates lose; None where that cannot be told.
        decay: what becomes of its weight decay.
        cost: what keeping the updates would take.
    """

    optimizer: str
    served: bool
    amount: Amount
    known_size: bool
    loss: Loss | None
    decay: Decay
    cost: Cost


def read(optimizer: Optimizer, known: Known, sample: int | None) -> Holding | None:
    """What an optimizer holds in bf16; None where it trains nothing in bf16.

    Args:
        optimizer: the optimizer.
        known: what is known of it.
        sample: how many weights the shares are read from; see :func:`precision_policy.lost_updates`.
    """
    groups = bf16_groups(optimizer)
    if not groups:
        return None
    return Holding(
        optimizer=optimizers.name(optimizer),
        served=optimizers.may_have_master_weights(optimizer, known),
        amount=amount([p for group in groups for p in group.params]),
        known_size=known.known_size,
        loss=loss(groups, sample) if known.known_size else None,
        decay=decay(optimizer, groups),
        cost=cost(known, groups),
    )


def amount(params: Sequence[torch.Tensor]) -> Amount:
    """How much these are."""
    elements = sum(map(parameters.whole_size, params))
    return Amount(len(params), elements, any(map(parameters.has_unknown_size, params)))


def trained(optimizer: Optimizer) -> list[torch.Tensor]:
    """The trainable parameters of an optimizer, each once."""
    by_number = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                by_number[id(param)] = param
    return list(by_number.values())


def bf16_groups(optimizer: Optimizer) -> list[Bf16Group]:
    """The groups that hold trainable bf16 parameters, with those parameters."""
    found = []
    for group in optimizer.param_groups:
        params = parameters.trainable(group["params"], (torch.bfloat16,))
        if params:
            ids = set(map(id, params))
            named = zip(group["params"], group.get("param_names") or [], strict=False)
            found.append(Bf16Group(group, params, [name for p, name in named if id(p) in ids]))
    return found


def loss(groups: Sequence[Bf16Group], sample: int | None) -> Loss | None:
    """The shares lost by kind, each group at its own learning rate; None where they cannot be read."""
    rates, rate_is = _rates_to_show(groups)
    if not all(map(math.isfinite, rates)):
        return None
    at_rates = [{"params": group.params, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
    estimates = histogram.lost_updates(at_rates, sample)
    rows = []
    for kind in parameters.KINDS:
        row = _row(kind, estimates, groups)
        if row is not None:
            rows.append(row)
    if not rows:
        return None
    whole = histogram.together(torch.bfloat16, [estimate.histogram for estimate in estimates])
    return Loss(
        rows=rows,
        rate=rates[0] if len(set(rates)) == 1 else None,
        rate_is=rate_is,
        sampled=whole.sampled,
        of_shard=_is_sharded(groups),
        loses_a_tenth=whole.rate_losing(0.1),
    )


def _row(kind: str, estimates: Iterable[histogram.GroupEstimate], groups: Sequence[Bf16Group]) -> Row | None:
    """The shares of one kind over all groups; None where there is none of it."""
    total, now, tenth = 0, 0.0, 0.0
    for estimate in estimates:
        counted = estimate.kinds.get(kind)
        if counted is not None:
            total += counted.total
            now += counted.total * counted.lost(estimate.lr)
            tenth += counted.total * counted.lost(0.1 * estimate.lr)
    if not total:
        return None
    elements = 0
    for group in groups:
        for param in group.params:
            if parameters.kind(param) == kind:
                elements += parameters.whole_size(param)
    return Row(kind, elements, now / total, tenth / total)


def _rates_to_show(groups: Sequence[Bf16Group]) -> tuple[list[float], Literal["current", "initial", "assumed"]]:
    """The rates that the figures are for: where a warm-up begins at 0, those that it leads to."""
    rates = [histogram.as_float(held.group.get("lr")) for held in groups]
    if any(rates):
        return rates, "current"
    initial = [histogram.as_float(held.group.get("initial_lr", 0.0)) for held in groups]
    if all(map(math.isfinite, initial)) and any(initial):
        return initial, "initial"
    return [_USUAL_RATE] * len(rates), "assumed"


def decay(optimizer: Optimizer, groups: Sequence[Bf16Group]) -> Decay:
    """What becomes of decoupled weight decay, by which part of itself a step shrinks a weight of each group."""
    shrinks = []
    for held in groups:
        rate = histogram.as_float(held.group.get("lr"))
        weight_decay = histogram.as_float(held.group.get("weight_decay", 0.0))
        is_decoupled = held.group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
        if is_decoupled and weight_decay > 0 and rate > 0:
            shrinks.append(rate * weight_decay)
    without_effect = [shrink for shrink in shrinks if shrink < DECAY_LIMIT]
    return Decay(len(without_effect), len(shrinks), max(without_effect, default=0.0))


def cost(known: Known, groups: Sequence[Bf16Group]) -> Cost:
    """What keeping the updates of these parameters would take."""
    elements, state = 0, 0
    for held in groups:
        of_group = sum(parameters.local(p).numel() for p in held.params)
        elements += of_group
        state += of_group * (optimizers.state_growth(known, held.group) or 0)
    return Cost(
        weights=2 * elements,
        gradients=2 * elements,
        state=None if known.state_grows is None else state,
        low_bits=BYTES_OF_LOW_BITS * elements,
        sharded=_is_sharded(groups),
    )


def _is_sharded(groups: Iterable[Bf16Group]) -> bool:
    return any(any(map(parameters.is_shard, group.params)) for group in groups)


def may_hold_bf16(optimizer: Optimizer) -> bool:
    """Whether a look at some of its parameters finds one of 2 bytes an element.

    Reading every dtype of 10,000 parameters takes a tenth of the time in which their optimizer is constructed. So of a group
    of more than 512 this looks at about 64, evenly spread; the stride is odd, since layers often alternate.
    """
    for group in optimizer.param_groups:
        params = group["params"]
        looked_at = params if len(params) <= 512 else params[:: len(params) // 64 | 1]
        try:
            # element_size is cheaper than dtype, which has to ask whether the tensor overrides it.
            found = 2 in map(torch.Tensor.element_size, looked_at)
        except ValueError:  # a lazy parameter, which has no elements yet, tells its dtype alone
            found = any(p.dtype in (torch.bfloat16, torch.float16) for p in looked_at)
        if found:
            return True
    return False
