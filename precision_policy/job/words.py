"""All texts of the job but the decision's own: what happens to this run, the fix, what that costs, then the figures.

The numbers come from ``holdings.py``. In a warning of lost updates, what is to be typed stands on a line of its own, without a
remark: log handlers wrap long lines, and a setting that is cut in two cannot be pasted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from precision_policy.job.holdings import DECAY_LIMIT, NEARLY_NOTHING, Amount, Cost, Decay, Holding, Loss
from precision_policy.record import Decision, Record

_MASTER_WEIGHTS = "precision_policy.master_weights=true"
_NO_KEY = "store the model in fp32 where the code makes it; no key in the config is known to set its dtype"
_PAIRS = "if this is another model than the config's: precision_policy.pairs can name further models"
_RECAST = "something recast the model: look for .to(torch.bfloat16), .bfloat16() or a bf16-true precision setting"
_NOT_READ = "nothing read the key, so set the dtype where the code reads it"


@dataclass(frozen=True)
class Told:
    """A warning in two lengths.

    Attributes:
        text: all of it, one log record of a few aligned lines.
        short: what happens and the fix, for an error that is printed more than once.
    """

    text: str
    short: str


def losing(option: str, record: Record, holding: Holding, several: bool) -> Told:
    """The warning about an optimizer that loses updates of bf16 weights, before its first step.

    Args:
        option: how the option that is on is called.
        record: the job's.
        holding: what the optimizer holds and loses.
        several: whether the job has made several optimizers by now, so that nobody knows which model this one trains.
    """
    first = f"{option}: {holding.optimizer} over bf16 weights, no fp32 master copy: {_lost(holding)}"
    what = "  a bf16 weight has 8 significant bits: an update too small for them leaves it as it was"
    head = [first, what]
    costs = []
    if holding.served:
        head += [
            "  fix, by fp32 master weights that the optimizer updates in place of the bf16 weights:",
            f"    {_MASTER_WEIGHTS}",
        ]
        costs += _cost_of_master_weights(holding.cost)
    asked = asked_for_fp32(record)
    fixes = [] if asked else list(dict.fromkeys(decision.fix for decision in record.decisions if decision.fix))
    if fixes:
        head += ["  or, to store the model in fp32:" if holding.served else "  fix, to store the model in fp32:"]
        head += [f"    {fix}" for fix in fixes]
        costs += _cost_of_fp32(record, holding.cost)
    elif not holding.served and not asked:
        head += [f"  fix: {_NO_KEY}"]
        costs += _cost_of_fp32(record, holding.cost)
    if several:
        head += [f"  {_PAIRS}"]
    elif asked:
        head += [f"  if these weights are meant by {asked}: {_why_it_did_not_arrive(record)}", f"  {_PAIRS}"]
    figures = [f"  {_stored(holding.amount)}", *_table(holding.loss), *_decay(holding.decay)]
    return Told("\n".join(head + costs + figures), "\n".join(head))


def refused(option: str, holding: Holding, reasons: Mapping[str, int]) -> Told:
    """The warning about bf16 weights for which master weights were asked for and not kept.

    Args:
        option: how the option that is on is called.
        holding: what the optimizer holds and loses.
        reasons: why, and for how many tensors; of other bf16 weights of the optimizer the updates are kept.
    """
    is_all = sum(reasons.values()) >= holding.amount.tensors
    loses = _lost(holding) if is_all else "small updates of these round away"
    short = f"{option}: {holding.optimizer} over bf16 weights, no master weights for {unserved(reasons)}: {loses}"
    figures = [f"  {_stored(holding.amount)}"]
    if is_all:
        figures += [*_table(holding.loss), *_decay(holding.decay)]
    return Told("\n".join([short, *figures]), short)


def summed_up(option: str, holdings: Sequence[Holding], amount: Amount) -> str:
    """The line for several optimizers that lose updates of bf16 weights: how much they hold, and the worst share."""
    head = f"{option}: {len(holdings):,} optimizers over bf16 weights, no fp32 master copy: {_stored(amount)}"
    with_loss = [holding for holding in holdings if holding.loss is not None]
    if not with_loss:
        return f"{head}; {_lost(holdings[0])}"
    worst = max(with_loss, key=share)
    return f"{head}; at worst {_lost(worst)}, by {worst.optimizer}"


def adapters(option: str, record: Record, holding: Holding) -> str:
    """The line for bf16 adapters, which are left alone: a full fine-tune mistaken for PEFT shows in these numbers."""
    rules = {decision.rule for decision in record.decisions}
    why = "the config has PEFT" if "peft" in rules else "the config has a quantized model"
    return (
        f"{option}: {holding.optimizer} over bf16 weights, no fp32 master copy: {_lost(holding)}; "
        f"{_stored(holding.amount)}; left as it is, since {why}"
    )


def perhaps_adapters(option: str, told: Told) -> Told:
    """The warning where ``strict`` cannot tell whether an optimizer trains adapters, which it would not stop."""
    remark = f"  {option} does not stop here: one of the models has PEFT, and it was not seen which model this one trains"
    return Told(f"{told.text}\n{remark}", told.short)


def not_arrived(option: str, record: Record, came: int, tensors: int, names: Sequence[str]) -> str:
    """The line for fp32 storage that was asked for, in a job of a single optimizer whose weights came in bf16.

    Args:
        option: how the option that is on is called.
        record: the job's.
        came: how many tensors came in bf16.
        tensors: how many the optimizer has.
        names: the first of their names, where it was given any.
    """
    named = f" ({', '.join(names)})" if names else ""
    return (
        f"{option}: {asked_for_fp32(record)} asked for fp32 storage, but {came:,} of {tensors:,} tensors came in bf16{named}: "
        f"{_why_it_did_not_arrive(record)}"
    )


def taken_back(option: str, optimizer: str) -> str:
    """The line for an engine that swapped fp32 copies in after construction."""
    return (
        f"{option}: warning taken back: at its first step {optimizer} holds no trainable bf16 parameters any more "
        "(an engine has swapped in its own fp32 copies, or the model was recast)"
    )


def wasted(option: str, optimizer: str, elements: int) -> str:
    """The line for fp32 storage under an optimizer that keeps an fp32 master copy of its own.

    Args:
        option: how the option that is on is called.
        optimizer: the class.
        elements: of its fp32 parameters on this rank.
    """
    saved = _bytes(2 * elements)
    return (
        f"{option}: {optimizer} keeps an fp32 master copy of its own: with bf16 storage the same run would need "
        f"{saved} less for weights and {saved} less for gradients"
    )


def monitored(option: str, optimizer: str, step: int, same: int, total: int, rates: str, with_masters: bool) -> str:
    """The monitor's line: the share of a sample that a step left unchanged."""
    what = "weights with their master weights" if with_masters else "weights"
    share_left = f"{same / total:.1%} of a sample of {total:,} {what} left unchanged"
    return f"{option}: step {step:,}: {share_left} by {optimizer} at lr {rates}"


def monitor_failed(option: str) -> str:
    """What is said once, where the monitor cannot go on."""
    return f"{option}: the monitor could not read a step; the job goes on"


@dataclass(frozen=True)
class Part:
    """What trained parameters have in common.

    Attributes:
        stored: the dtype that they are stored in.
        updated: the words for what they are updated in; empty where that is not known.
        computed: the words for what they are computed in; empty where that is not known.
    """

    stored: str
    updated: str
    computed: str


@dataclass
class Sum:
    """How much there is of a part.

    Attributes:
        amount: the parameters.
        added_bytes: what master weights add on this rank.
        reasons: why master weights were not kept, and for how many tensors.
    """

    amount: Amount = field(default_factory=lambda: Amount(0, 0))
    added_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Sum) -> None:
        """Add another one."""
        self.amount += other.amount
        self.added_bytes += other.added_bytes
        self.reasons += other.reasons


def confirmed(option: str, parts: Mapping[Part, Sum], optimizers: int, frozen: Mapping[str, Amount], note: str) -> str:
    """The line that says what came of it all, after the job's first step.

    Args:
        option: how the option that is on is called.
        parts: what is trained.
        optimizers: by how many optimizers.
        frozen: what is not trained in the same models, by dtype.
        note: what is to be said in addition; empty where there is nothing.
    """
    whole = Amount(0, 0)
    clauses = []
    for part, total in parts.items():
        whole += total.amount
        clause = _ways(part, total)
        if len(parts) > 1:
            clause = f"{_tensors(total.amount.tensors)} ({_elements(total.amount)}) {clause}"
        clauses.append(clause)
    clauses += [f"{_elements(amount)} frozen, stored in {dtype}" for dtype, amount in frozen.items()]
    if note:
        clauses.append(note)
    by = f" in {optimizers:,} optimizers" if optimizers > 1 else ""
    return f"{option}: {_tensors(whole.tensors, 'trainable ')}, {_elements(whole)}{by}: {'; '.join(clauses)}"


def _ways(part: Part, total: Sum) -> str:
    ways = [f"stored in {part.stored}"]
    if part.updated:
        ways.append(part.updated)
    if total.added_bytes:
        ways[-1] += f" (adds {_bytes(total.added_bytes)} per rank)"
    if total.reasons:
        ways.append(f"no master weights for {unserved(total.reasons)}")
    if part.computed:
        ways.append(part.computed)
    return ", ".join(ways)


UPDATED_BY_MASTER_WEIGHTS = "updated in fp32 by master weights that the policy keeps"
"""What bf16 parameters with master weights are updated in."""

NOT_UPDATED = "not updated in the first step"
"""What becomes of bf16 parameters that the first step left out, as they had no gradient."""

NOTHING_IN_BF16 = "no master weights are kept, as nothing trainable is stored in bf16"
"""The confirmation's note where master weights were asked for in vain."""

NOT_BY_TORCH = "the step never came through a class of torch.optim"
"""Why an optimizer has no master weights where its step did not pass by."""

FP16 = "fp16 needs loss scaling as well"
"""Why fp16 parameters have no master weights; the other reasons are of bf16 ones."""

LBFGS_IS_ONE_VECTOR = "LBFGS works on all parameters as one vector"
DIFFERENTIABLE = "differentiable=True keeps the graph of the update"
STATE_IS_A_PROPERTY = "its class makes its state or its parameter groups anew each time they are asked for"
SPARSE = "its gradients are sparse"
UNKNOWN_TENSOR = "it is a tensor of a class that is not known"
"""Why an optimizer, or one of its parameters, has no master weights."""

ENGINES_COPIES = "fp32 copies that an engine has made of bf16 weights"
"""What parameters are stored in that took the place of bf16 ones between construction and first step."""


NOBODY: Final = "no autocast or mixed precision"
"""What a model is called under where nobody supplies 16 bits."""

LEFT_ALONE: Final = "no autocast of the policy's, which leaves PEFT and quantized models alone"
"""What such a model is called under, in a job that trains others as well."""

APPLICATIONS: Final = "the application's autocast"
"""What a model is called under where the application enters it."""

POLICYS: Final = "autocast that the policy supplies"
"""What a model is called under where the policy enters it."""


def updated_in(dtype: str) -> str:
    """What parameters are updated in that an optimizer updates in place."""
    return f"updated in {dtype}"


def updated_by(optimizer: str, keeps: str) -> str:
    """What 16-bit parameters are updated in by an optimizer that brings something of its own."""
    if keeps == "master":
        return f"updated in fp32 by a master copy that {optimizer} keeps"
    return f"updated by {optimizer}, which makes up for rounding"


def computed_in(dtype: str | None, by: str | None) -> str:
    """What parameters are computed in, and by whose doing; empty where neither is known."""
    if dtype is None:
        return f"called under {by}" if by else ""
    return f"computed in {dtype} by {by}" if by else f"computed in {dtype}"


def unserved(reasons: Mapping[str, int]) -> str:
    """For how many tensors there are no master weights, and why."""
    return ", ".join(f"{_tensors(count)}: {why}" for why, count in reasons.items())


def asked_for_fp32(record: Record) -> str:
    """The settings by which fp32 storage of every model was asked for; empty where it was not."""
    if not record.decisions or not all(decision.fp32 for decision in record.decisions):
        return ""
    return ", ".join(map(_setting, record.decisions))


def share(holding: Holding) -> float:
    """The share of updates that is lost, 0 to 1; 0 where it is not known."""
    return 0.0 if holding.loss is None else holding.loss.now


def _setting(decision: Decision) -> str:
    value = str(decision.after)
    if isinstance(decision.after, bool):
        value = value.lower()
    return f"{decision.key}={value}"


def _why_it_did_not_arrive(record: Record) -> str:
    """The likelier explanation first: a key that the policy added may have no reader; one that was there has one."""
    added = any(decision.added for decision in record.decisions)
    return f"{_NOT_READ}; or {_RECAST}" if added else _RECAST


def _lost(holding: Holding) -> str:
    """What becomes of the updates, in a share where that is known."""
    loss = holding.loss
    if loss is None:
        return "small updates round away" if holding.known_size else "updates under half a bf16 step of a weight round away"
    told = f"{loss.now:.1%} of updates round away at {_rate(loss)}"
    if loss.now < NEARLY_NOTHING and loss.loses_a_tenth:
        told += f"; below lr {loss.loses_a_tenth:.1g} a tenth would"
    return told


def _rate(loss: Loss) -> str:
    remarks = {"current": "", "initial": " (initial_lr; lr is 0 now)", "assumed": " (assumed; lr is 0 now)"}
    rate = "each group's lr" if loss.rate is None else f"lr {loss.rate:g}"
    return rate + remarks[loss.rate_is]


def _stored(amount: Amount) -> str:
    partly = ", of this rank's shard" if amount.partly else ""
    return f"{_tensors(amount.tensors, 'trainable ')} ({amount.elements:,} elements{partly}) stored in bf16"


def _tensors(count: int, which: str = "") -> str:
    return f"{count:,} {which}tensor" if count == 1 else f"{count:,} {which}tensors"


def _elements(amount: Amount) -> str:
    """The number of elements, in three digits where it is large."""
    partly = " of this rank's shard" if amount.partly else ""
    if amount.elements < 10**6:
        return f"{amount.elements:,} elements{partly}"
    rounded = float(f"{amount.elements:.3g}")  # it may reach the next unit: 999,700,000 is 1 B
    unit, size = ("B", 10**9) if rounded >= 10**9 else ("M", 10**6)
    count = amount.elements / size
    shown = f"{count:,.0f}" if rounded >= 1000 * size else f"{count:.3g}"
    return f"{shown} {unit} elements{partly}"


def _cost_of_master_weights(cost: Cost) -> list[str]:
    each = " on each rank" if cost.sharded else ""
    return [
        f"  master weights add{each}: low bits {_bytes(cost.low_bits)}, optimizer state {_state(cost)}",
        "    not counted: a piece of the weights and gradients in fp32 while the optimizer steps",
    ]


def _cost_of_fp32(record: Record, cost: Cost) -> list[str]:
    each = " on each rank" if cost.sharded else ""
    sizes = f"weights {_bytes(cost.weights)}, gradients {_bytes(cost.gradients)}, optimizer state {_state(cost)}"
    activations = "activations, which double unless computed in bf16 by autocast (the option mixed, or your framework's); "
    if record.compute_dtype is not None:
        activations = ""
    return [
        f"  fp32 storage adds{each}: {sizes}",
        f"    not counted: {activations}under autocast, its bf16 copies of the weights, and outputs in fp32",
    ]


def _state(cost: Cost) -> str:
    return "not counted" if cost.state is None else _bytes(cost.state)


def _table(loss: Loss | None) -> list[str]:
    """The shares by kind of parameter."""
    if loss is None:
        return []
    rate = _rate(loss)
    sources = []
    if loss.sampled:
        sources.append("an even sample")
    if loss.of_shard:
        sources.append("this rank's shard")
    note = f", from {' of '.join(sources)}" if sources else ""
    width = max(18, len(rate) + 5)
    lines = [f"  {'weights that an update cannot move':<36}{'at ' + rate:>{width}}{'at a tenth of it':>18}{note}"]
    for row in loss.rows:
        kind = f"{row.kind} ({row.elements:,})"
        lines.append(f"    {kind:<34}{row.now:>{width}.1%}{row.tenth:>18.1%}")
    return lines


def _decay(decay: Decay) -> list[str]:
    """The line for weight decay that is too small to move any weight."""
    if not decay.without_effect:
        return []
    if decay.without_effect < decay.groups:
        return [f"  weight decay does nothing in {decay.without_effect} of {decay.groups} groups, at their rates"]
    return [
        f"  weight decay does nothing at this rate: a step takes lr * weight_decay = {decay.most:.0e} of a weight, "
        f"and bf16 drops what is under {DECAY_LIMIT:.3%}"
    ]


def _bytes(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1000 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.4g} {unit}"


def slow(option: str, device: str, device_type: str, is_tf32: bool) -> str:
    """The warning for fp32 weights that the policy asked for, called under nothing where bf16 would be fast.

    Args:
        option: the option that is on.
        device: the device's name.
        device_type: its type, as ``torch.autocast`` takes it.
        is_tf32: whether torch multiplies fp32 matrices in TF32.
    """
    times = 3 if is_tf32 else 7
    return "\n".join(
        [
            f"{option}: the fp32 weights are called under {NOBODY} on {device}: about {times} times slower than in bf16, on an "
            "H200, unless the model turns autocast on inside",
            "  fix, as by the option mixed:",
            "    precision_policy.compute_dtype=bfloat16",
            '  or your framework\'s own: TrainingArguments(bf16=True), Lightning precision="bf16-mixed", accelerate '
            f'mixed_precision="bf16", FSDP2 MixedPrecisionPolicy(param_dtype=torch.bfloat16), '
            f'torch.autocast("{device_type}", torch.bfloat16)',
            "  measured: a Llama of 1.10 B parameters, tokens/s: 6.4 thousand in fp32, 46.7 in bf16 by autocast",
        ]
    )


def not_supplied(option: str, compute_dtype: str, why: str, fix: str) -> str:
    """The warning for bf16 compute that was asked for and that the policy keeps out of a model.

    Args:
        option: the option that is on.
        compute_dtype: what was asked for.
        why: one clause.
        fix: what helps, or empty.
    """
    text = f"{option}: compute_dtype={compute_dtype} was asked for, and is not supplied: {why}"
    return f"{text}\n  fix: {fix}" if fix else text


def not_called(option: str, compute_dtype: str, device_type: str) -> str:
    """The warning for bf16 compute that was asked for weights that no module was seen to own when it was called."""
    why = (
        "until the first step, no module that owns the weights was called through its __call__, outside of functions that "
        "were compiled before"
    )
    fix = f'put torch.autocast("{device_type}", torch.bfloat16) around what computes with the weights'
    return not_supplied(option, compute_dtype, why, fix)
