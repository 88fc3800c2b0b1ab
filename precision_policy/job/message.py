"""The words of the watch: what happens to this run, in numbers, and what to do about it. Pure but for reading weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from precision_policy.estimate import histogram as estimate
from precision_policy.estimate import parameters
from precision_policy.job.optimizers import Known, name
from precision_policy.job.plan import Plan

_INERT = 2.0**-9  # of lr * weight_decay: half a bf16 step, relative to the largest weight of an exponent
_USUAL_RATE = 1e-5  # shown where a schedule begins at 0 and the group does not tell where it leads
_ACTIVATIONS = (
    "  (activations double too, unless computed in bf16: precision_policy=mixed, or your framework's mixed precision)"
)
_KAHAN = 2  # bytes for each element of the compensation, stored like the weight
NEARLY_NOTHING = 0.01
"""A share of lost updates, 0 to 1, under which the record is an INFO."""


@dataclass(frozen=True)
class LowPrecision:
    """The trainable bf16 parameters of one group, and their names where the optimizer was given any."""

    group: dict[str, Any]
    params: list[torch.Tensor]
    names: list[str]


def low_precision(optimizer: Optimizer) -> list[LowPrecision]:
    """The groups that hold trainable bf16 parameters, with those parameters."""
    found = []
    for group in optimizer.param_groups:
        mine = parameters.trainable(group["params"], (torch.bfloat16,))
        if mine:
            ids = set(map(id, mine))
            names = [n for p, n in zip(group["params"], group.get("param_names") or [], strict=False) if id(p) in ids]
            found.append(LowPrecision(group, mine, names))
    return found


@dataclass(frozen=True)
class Warning:
    """A warning in two lengths.

    Attributes:
        text: all of it, one log record of a few aligned lines.
        short: its first line and the fix, for an error that is printed more than once.
        nearly_nothing: whether next to nothing is lost, now and at a tenth of the learning rate.
    """

    text: str
    short: str
    nearly_nothing: bool


def warning(optimizer: Optimizer, known: Known, low: Sequence[LowPrecision], plan: Plan, other_way: str | None) -> Warning:
    """What is lost, the fix, then the table; the first line is short enough for a log viewer.

    Args:
        optimizer: the optimizer.
        known: what is known of it.
        low: its bf16 parameters.
        plan: the job's.
        other_way: the line to paste for a compensating optimizer, or None.
    """
    shares = _shares(low, plan.sample) if known.known_size else None
    counted = _counted(low)
    lines: list[str] = []
    if plan.asked:
        every = sum(len(group["params"]) for group in optimizer.param_groups)
        came = sum(len(one.params) for one in low)
        first = f"{plan.asked} asked for fp32 storage, but {came:,} of {every:,} tensors came in bf16"
        fix = _why_it_did_not_arrive(plan)
        names = [n for one in low for n in one.names][:3]
        lines.append(f"{name(optimizer)} got them{': ' + ', '.join(names) if names else ''}; {counted}")
    else:
        first = f"{name(optimizer)} over bf16 weights, no fp32 master copy: {_loses(known, shares)}"
        fix = f"{plan.fix}{_ACTIVATIONS}" if plan.compute_dtype is None else plan.fix
        lines.append(f"or keep bf16 with a compensating optimizer: {_other_way(other_way, low)}")
        lines.append(counted)
    lines += [*_table(shares), *filter(None, [_decay(optimizer, low), _cost(known, low)])]
    head = f"{plan.option}: {first}\n  fix: {fix}"
    text = "\n".join([head, *(f"  {line}" for line in lines)])
    return Warning(text, head, shares is not None and max(shares.now, shares.tenth) < NEARLY_NOTHING)


def taken_back(optimizer: Optimizer, plan: Plan) -> str:
    """The line for an engine that swapped fp32 copies in after construction."""
    return (
        f"{plan.option}: warning taken back: at its first step {name(optimizer)} holds no trainable bf16 parameters any more "
        "(an engine has swapped in its own fp32 copies)"
    )


def holds(optimizer: Optimizer, plan: Plan) -> str:
    """The line for a job that was taken for PEFT: a full fine-tune mistaken for it shows in these numbers."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    low = parameters.trainable(params, (torch.bfloat16,))
    return (
        f"{plan.option}: {name(optimizer)} trains {_tensors(len(params))}, {_elements(params)}, "
        f"of these {_elements(low)} stored in bf16"
    )


def wasted(optimizer: Optimizer, plan: Plan) -> str | None:
    """The line for fp32 storage under an optimizer that keeps an fp32 master copy of its own; None without any."""
    params = parameters.trainable((p for g in optimizer.param_groups for p in g["params"]), (torch.float32,))
    if not params:
        return None
    saved = _bytes(2 * sum(parameters.local(p).numel() for p in params))
    return (
        f"{plan.option}: {name(optimizer)} keeps an fp32 master copy of its own: with bf16 storage the same run would need "
        f"{saved} less for weights and {saved} less for gradients"
    )


def confirmed(optimizer: Optimizer, plan: Plan, computed: str | None, supplier: str | None) -> str:
    """The line that says what came of it: how much is trained, stored in what, computed in what."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    dtypes = sorted({parameters.short_name(p.dtype) for p in params}, reverse=True)
    stored = " and ".join(f"{dtype} ({sum(parameters.short_name(p.dtype) == dtype for p in params):,})" for dtype in dtypes)
    if len(dtypes) == 1:
        stored = dtypes[0]
    compute = f", computed in {computed}" if computed else ""
    if supplier:
        compute += f" by {supplier}" if computed else f", called under {supplier}"
    return f"{plan.option}: {_tensors(len(params))}, {_elements(params)}: stored in {stored}{compute}"


@dataclass(frozen=True)
class _Row:
    """One kind of parameter: its elements, and the shares (0 to 1) that an update at lr and at a tenth of it cannot move."""

    kind: str
    elements: int
    now: float
    tenth: float


@dataclass(frozen=True)
class _Shares:
    """The rows, what their learning rate is called, what they were read from, and the rate under which a tenth is lost."""

    rows: list[_Row]
    label: str
    note: str
    loses_a_tenth: float

    @property
    def now(self) -> float:
        return sum(row.now * row.elements for row in self.rows) / sum(row.elements for row in self.rows)

    @property
    def tenth(self) -> float:
        return sum(row.tenth * row.elements for row in self.rows) / sum(row.elements for row in self.rows)


def _shares(low: Sequence[LowPrecision], sample: int | None) -> _Shares | None:
    """The shares lost by kind, each group at its own learning rate; None where they cannot be read."""
    rates = [estimate.as_float(one.group.get("lr")) for one in low]
    if not all(math.isfinite(rate) for rate in rates):
        return None
    rates, remark = _rates_to_show(low, rates)
    groups = estimate.lost_updates([{"params": one.params, "lr": rate} for one, rate in zip(low, rates, strict=True)], sample)
    rows = []
    for kind in parameters.KINDS:
        counted = [(group.kinds[kind], group.lr) for group in groups if kind in group.kinds]
        total = sum(histogram.total for histogram, _ in counted)
        if total:
            now, tenth = (sum(h.total * h.lost(rate * factor) for h, rate in counted) / total for factor in (1, 0.1))
            elements = sum(parameters.whole_size(p) for one in low for p in one.params if parameters.kind(p) == kind)
            rows.append(_Row(kind, elements, now, tenth))
    if not rows:
        return None
    every = estimate.together(torch.bfloat16, [group.histogram for group in groups])
    shards = any(parameters.is_shard(p) for one in low for p in one.params)
    read_from = ["an even sample"] * every.sampled + ["this rank's shard"] * shards
    label = f"lr {rates[0]:g}" if len(set(rates)) == 1 else "each group's lr"
    return _Shares(rows, label + remark, " of ".join(read_from), every.rate_losing(0.1))


def _rates_to_show(low: Sequence[LowPrecision], rates: list[float]) -> tuple[list[float], str]:
    """The rates that the figures are for: where a warm-up begins at 0, those that it leads to, and a remark that says so."""
    if any(rates):
        return rates, ""
    initial = [estimate.as_float(one.group.get("initial_lr", 0.0)) for one in low]
    if all(math.isfinite(rate) for rate in initial) and any(initial):
        return initial, " (initial_lr; lr is 0 now)"
    return [_USUAL_RATE] * len(rates), " (assumed; lr is 0 now)"


def _loses(known: Known, shares: _Shares | None) -> str:
    if shares is None:
        return "small updates round away" if known.known_size else "updates under half a bf16 step of a weight round away"
    told = f"{shares.now:.1%} of updates round away at {shares.label}"
    if shares.now < NEARLY_NOTHING and shares.loses_a_tenth:
        told += f", a tenth under lr {shares.loses_a_tenth:.0e}"
    return told


def _why_it_did_not_arrive(plan: Plan) -> str:
    """The likelier explanation first: a key that the policy added may have no reader; one that was there has one."""
    nobody = "nothing read the key, so set the dtype where the code reads it"
    recast = "something recast the model: look for .to(torch.bfloat16), .bfloat16() or a bf16-true precision setting"
    named = f" (in the config: {plan.elsewhere})" if plan.elsewhere else ""
    return f"{nobody}{named}; or {recast}" if plan.added else f"{recast}{named}"


def _other_way(line: str | None, low: Sequence[LowPrecision]) -> str:
    adds = _bytes(_KAHAN * sum(parameters.local(p).numel() for one in low for p in one.params))
    return f"{line or 'torch-optimi, with Kahan summation'}  (adds {adds})"


def _counted(low: Sequence[LowPrecision]) -> str:
    params = [p for one in low for p in one.params]
    partly = ", of this rank's shard" if any(map(parameters.has_unknown_size, params)) else ""
    elements = sum(map(parameters.whole_size, params))
    return f"{_tensors(len(params))} ({elements:,} elements{partly}) stored in bf16"


def _tensors(count: int) -> str:
    return f"{count:,} trainable tensor{'s' * (count != 1)}"


def _elements(params: Sequence[torch.Tensor]) -> str:
    """The number of elements of the whole parameters, in three digits where it is large."""
    count = sum(map(parameters.whole_size, params))
    partly = " of this rank's shard" if any(map(parameters.has_unknown_size, params)) else ""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            amount = count / size
            return f"{amount:,.0f} {unit} elements{partly}" if amount >= 1000 else f"{amount:,.3g} {unit} elements{partly}"
    return f"{count:,} elements{partly}"


def _table(shares: _Shares | None) -> list[str]:
    if shares is None:
        return []
    note = f", from {shares.note}" if shares.note else ""
    width = max(18, len(shares.label) + 5)
    head = f"{'weights that an update cannot move':<36}{'at ' + shares.label:>{width}}{'at a tenth of it':>18}{note}"
    rows = [f"  {row.kind + f' ({row.elements:,})':<34}{row.now:>{width}.1%}{row.tenth:>18.1%}" for row in shares.rows]
    return [head, *rows]


def _decay(optimizer: Optimizer, low: Sequence[LowPrecision]) -> str | None:
    shrinks = []  # by which part of itself a step shrinks a weight of each group
    for one in low:
        rate, decay = estimate.as_float(one.group.get("lr")), estimate.as_float(one.group.get("weight_decay", 0.0))
        decoupled = one.group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__)
        if decoupled and decay > 0 and rate > 0:
            shrinks.append(rate * decay)
    inert = sum(shrink < _INERT for shrink in shrinks)
    if inert and inert == len(shrinks):
        return f"weight decay is inert: lr * weight_decay = {max(shrinks):.0e} is under 2^-9"
    return f"weight decay is inert in {inert} of {len(shrinks)} groups" if inert else None


def _cost(known: Known, low: Sequence[LowPrecision]) -> str:
    elements = sum(parameters.local(p).numel() for one in low for p in one.params)
    state = known.state_grows + (known.state_grows // 2 if low[0].group.get("amsgrad") else 0)
    sharded = any(parameters.is_shard(p) for one in low for p in one.params)
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
