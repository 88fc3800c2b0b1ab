"""The words of the watch: what happens to this run, in numbers, and what to do about it. Pure but for reading weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from precision_policy import estimate
from precision_policy.optimizers import Known, name

_INERT = 2.0**-9  # of lr * weight_decay: half a bf16 step, relative to the largest weight of an exponent


@dataclass(frozen=True)
class Asked:
    """What the config asked for.

    Attributes:
        fix: the override that would give this application fp32 storage.
        fp32_by: the setting by which fp32 storage was asked for already, or None.
        sample: how many elements the estimate may look at; see :func:`precision_policy.estimate.lost_updates`.
    """

    fix: str
    fp32_by: str | None = None
    sample: int | None = None


@dataclass(frozen=True)
class Low:
    """The trainable bf16 parameters of one group.

    Attributes:
        group: the parameter group.
        params: those parameters.
        names: their names, where the optimizer was given any.
    """

    group: dict[str, Any]
    params: list[torch.Tensor]
    names: list[str]


def low_precision(optimizer: Optimizer) -> list[Low]:
    """The groups that hold trainable bf16 parameters, with those parameters."""
    found = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or [""] * len(group["params"])
        mine = [(p, n) for p, n in zip(group["params"], names, strict=False) if p.dtype is torch.bfloat16 and p.requires_grad]
        if mine:
            found.append(Low(group, [p for p, _ in mine], [n for _, n in mine if n]))
    return found


def warning(optimizer: Optimizer, known: Known, low: Sequence[Low], asked: Asked) -> str:
    """The warning, one log record of a few aligned lines; the first is short enough for a log viewer."""
    params = [p for one in low for p in one.params]
    counted = f"{len(params):,} trainable tensors ({sum(whole(p) for p in params):,} elements) are stored in bf16"
    shares = _shares(low, asked.sample)
    total = next((row for row in shares if row.kind == "all"), None)
    if asked.fp32_by:
        every = sum(len(group["params"]) for group in optimizer.param_groups)
        names = [n for one in low for n in one.names][:3]
        first = f"{asked.fp32_by} asked for fp32 storage, but {len(params):,} of {every:,} tensors came in bf16"
        lines = [f"{name(optimizer)} got them{': ' + ', '.join(names) if names else ''}; {counted}"]
        fix = "something recast the model: look for .to(torch.bfloat16), .bfloat16() or a bf16-true precision setting"
    else:
        loses = f"{total.now:.1%} of updates round away at {total.label}" if total else "updates round away"
        first = f"{name(optimizer)} over bf16 weights, no fp32 master copy: {loses}"
        lines, fix = [counted], f"{asked.fix}  (compute may stay bf16, by autocast)"
    lines += _table(shares)
    lines += filter(None, [_decay(optimizer, low), _cost(known, low)])
    return "\n".join([first, *(f"  {line}" for line in lines), f"  fix: {fix}"])


def taken_back(optimizer: Optimizer) -> str:
    """The line for an engine that swapped fp32 copies in after construction."""
    return (
        f"warning taken back: at its first step {name(optimizer)} holds no trainable bf16 parameters any more "
        "(an engine has swapped in its own fp32 copies)"
    )


def wasted(optimizer: Optimizer) -> str | None:
    """The line for fp32 storage under an optimizer that keeps an fp32 master copy of its own; None without any."""
    params = [p for g in optimizer.param_groups for p in g["params"] if p.dtype is torch.float32 and p.requires_grad]
    if not params:
        return None
    elements = sum(estimate.local(p).numel() for p in params)
    return (
        f"{name(optimizer)} keeps an fp32 master copy of its own: with bf16 storage the same run would need "
        f"{_bytes(2 * elements)} less for weights and {_bytes(2 * elements)} less for gradients"
    )


def whole(param: torch.Tensor) -> int:
    """The elements of the whole parameter, not of this rank's shard (DTensor, and FSDP's flat parameters)."""
    return int(getattr(param, "_unpadded_unsharded_size", param).numel())


@dataclass(frozen=True)
class _Row:
    kind: str
    label: str
    elements: int
    now: float
    tenth: float
    sampled: bool


def _shares(low: Sequence[Low], sample: int | None) -> list[_Row]:
    """The shares lost, for all elements and by kind, each group at its own learning rate."""
    rates = [estimate.as_float(one.group.get("lr")) for one in low]
    if not all(math.isfinite(rate) for rate in rates):
        return []
    if not any(rates):  # a warm-up begins at 0, where nothing moves anyway: show a usual fine-tuning rate
        rates = [1e-5] * len(rates)
    label = f"lr {rates[0]:g}" if len(set(rates)) == 1 else "each group's lr"
    step = estimate.stride([p for one in low for p in one.params], sample)
    rows: list[_Row] = []
    for kind, least, most in (("matrices", 2, 99), ("1-dimensional", 0, 1)):
        counted = []
        for one, rate in zip(low, rates, strict=True):
            params = [p for p in one.params if least <= p.dim() <= most]
            if params:
                counted.append((estimate.histogram(params, torch.bfloat16, step)[0], rate))
        rows += _row(kind, label, counted)
    if not rows:
        return []
    elements = sum(row.elements for row in rows)
    now, tenth = (sum(getattr(row, at) * row.elements for row in rows) / elements for at in ("now", "tenth"))
    return [_Row("all", label, elements, now, tenth, any(row.sampled for row in rows)), *rows]


def _row(kind: str, label: str, counted: Sequence[tuple[estimate.Histogram, float]]) -> Iterator[_Row]:
    elements = sum(histogram.total for histogram, _ in counted)
    if elements:
        now, tenth = (
            sum(histogram.total * histogram.lost(rate * factor) for histogram, rate in counted) / elements
            for factor in (1, 0.1)
        )
        yield _Row(kind, label, elements, now, tenth, any(histogram.sampled for histogram, _ in counted))


def _table(rows: Sequence[_Row]) -> list[str]:
    if not rows:
        return []
    note = ", from an even sample" if rows[0].sampled else ""
    tenth = "a tenth of it"
    lines = [f"{'weights that an update cannot move':<36}{'at ' + rows[0].label:>18}{'at ' + tenth:>18}{note}"]
    return lines + [
        f"  {row.kind + f' ({row.elements:,})':<34}{row.now:>18.1%}{row.tenth:>18.1%}" for row in rows if row.kind != "all"
    ]


def _decay(optimizer: Optimizer, low: Sequence[Low]) -> str | None:
    inert, largest = [], 0.0
    for one in low:
        rate, decay = estimate.as_float(one.group.get("lr")), estimate.as_float(one.group.get("weight_decay", 0.0))
        decoupled = one.group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
        if decoupled and decay > 0 and rate > 0:
            inert.append(rate * decay < _INERT)
            largest = max(largest, rate * decay)
    if not inert:
        return None
    if all(inert):
        return f"weight decay is inert: lr * weight_decay = {largest:.0e} is under 2^-9"
    return f"weight decay is inert in {sum(inert)} of {len(inert)} groups" if any(inert) else None


def _cost(known: Known, low: Sequence[Low]) -> str:
    elements = sum(estimate.local(p).numel() for one in low for p in one.params)
    state = known.state_grows + (known.state_grows // 2 if low[0].group.get("amsgrad") else 0)
    sharded = any(estimate.local(p).numel() != whole(p) for one in low for p in one.params)
    return (
        f"fp32 storage adds{' on each rank' if sharded else ''}: weights {_bytes(2 * elements)}, "
        f"gradients {_bytes(2 * elements)}, optimizer state {_bytes(state * elements)}"
    )


def _bytes(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1000 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.4g} {unit}"
