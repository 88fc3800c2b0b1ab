"""The words of the watch: what happens to this run, in numbers, and what to do about it. Pure but for reading weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from precision_policy import estimate
from precision_policy.optimizers import Known, name

# Attributes of FSDP1's parameters (torch/distributed/fsdp/_flat_param.py, torch 2.13): a flat parameter's size before it was
# sharded, and the mark of an original parameter that is now a view into one.
_FLAT, _FLATTENED = "_unpadded_unsharded_size", "_fsdp_flattened"
_KINDS = ("matrices", "1-dimensional", "flattened by FSDP")
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
    partly = ", of this rank's shard" if any(map(_of_unknown_whole, params)) else ""
    tensors = f"{len(params):,} trainable tensor{'s' * (len(params) > 1)}"
    counted = f"{tensors} ({sum(map(whole, params)):,} elements{partly}) stored in bf16"
    shares = _shares(low, asked.sample)
    if asked.fp32_by:
        every = sum(len(group["params"]) for group in optimizer.param_groups)
        names = [n for one in low for n in one.names][:3]
        first = f"{asked.fp32_by} asked for fp32 storage, but {len(params):,} of {every:,} tensors came in bf16"
        lines = [f"{name(optimizer)} got them{': ' + ', '.join(names) if names else ''}; {counted}"]
        fix = "something recast the model: look for .to(torch.bfloat16), .bfloat16() or a bf16-true precision setting"
    else:
        loses = f"{shares.now:.1%} of updates round away at {shares.label}" if shares else "updates round away"
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
    """The elements of the whole parameter, not of this rank's shard; for a shard that does not know its whole, its own."""
    return int(getattr(param, _FLAT, param).numel())


def _of_unknown_whole(param: torch.Tensor) -> bool:
    # FSDP1 with use_orig_params: a view into the shard, whose shape is kept where only FSDP finds it.
    return hasattr(param, _FLATTENED) and not hasattr(param, _FLAT)


def _is_shard(param: torch.Tensor) -> bool:
    return estimate.local(param).numel() != whole(param) or _of_unknown_whole(param)


def _kind(param: torch.Tensor) -> str:
    if hasattr(param, _FLAT) or hasattr(param, _FLATTENED):
        return _KINDS[2]
    return _KINDS[0] if param.dim() > 1 else _KINDS[1]


@dataclass(frozen=True)
class _Row:
    """One kind of parameter: its elements, and the shares (0 to 1) that an update at lr and at a tenth of it cannot move."""

    kind: str
    elements: int
    now: float
    tenth: float


@dataclass(frozen=True)
class _Shares:
    """The rows, what their learning rate is called, and what they were read from, where not from all."""

    rows: list[_Row]
    label: str
    note: str

    @property
    def now(self) -> float:
        return sum(row.now * row.elements for row in self.rows) / sum(row.elements for row in self.rows)


def _shares(low: Sequence[Low], sample: int | None) -> _Shares | None:
    """The shares lost by kind, each group at its own learning rate; None where they cannot be read."""
    rates = [estimate.as_float(one.group.get("lr")) for one in low]
    if not all(math.isfinite(rate) for rate in rates):
        return None
    if not any(rates):  # a warm-up begins at 0, where nothing moves anyway: show a usual fine-tuning rate
        rates = [1e-5] * len(rates)
    every = [p for one in low for p in one.params]
    step = estimate.stride(every, sample)
    rows, sampled = [], False
    for kind in _KINDS:
        groups = [([p for p in one.params if _kind(p) == kind], rate) for one, rate in zip(low, rates, strict=True)]
        counted = [(estimate.histogram(params, torch.bfloat16, step)[0], rate) for params, rate in groups]
        total = sum(histogram.total for histogram, _ in counted)
        if total:
            now, tenth = (sum(h.total * h.lost(rate * factor) for h, rate in counted) / total for factor in (1, 0.1))
            rows.append(_Row(kind, sum(whole(p) for params, _ in groups for p in params), now, tenth))
            sampled = sampled or any(histogram.sampled for histogram, _ in counted)
    if not rows:
        return None
    read_from = ["an even sample"] * sampled + ["this rank's shard"] * any(map(_is_shard, every))
    label = f"lr {rates[0]:g}" if len(set(rates)) == 1 else "each group's lr"
    return _Shares(rows, label, " of ".join(read_from))


def _table(shares: _Shares | None) -> list[str]:
    if shares is None:
        return []
    note = f", from {shares.note}" if shares.note else ""
    head = f"{'weights that an update cannot move':<36}{'at ' + shares.label:>18}{'at a tenth of it':>18}{note}"
    return [head] + [f"  {row.kind + f' ({row.elements:,})':<34}{row.now:>18.1%}{row.tenth:>18.1%}" for row in shares.rows]


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
    sharded = any(_is_shard(p) for one in low for p in one.params)
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
