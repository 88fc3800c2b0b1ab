"""What the job is to do, read from the decision that is recorded in its config. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from precision_policy.record import FROZEN_BASE, Decision, Record

Action = Literal["warn", "error", "ignore", "count"]

_NOT_IN_16_BITS = "store the model in fp32 where the code makes it; no key in the config is known to set its dtype"


@dataclass(frozen=True)
class Plan:
    """What to look for and what to say. It travels to the processes that the job starts.

    Attributes:
        option: how the option that speaks is switched on, such as ``precision_policy=on``.
        fix: what to type for fp32 storage.
        asked: the setting by which fp32 storage was asked for already, or empty.
        added: whether the policy added that setting where none was.
        action: what an optimizer that would lose updates leads to; "count": only say what it holds.
        sample: how many elements the estimate may look at; see :func:`precision_policy.lost_updates`.
        confirms: whether the first step says what the weights are stored and computed in.
        set_over_checkpoint: whether the policy set fp32 where the checkpoint's own dtype would have been loaded.
        compute_dtype: "bfloat16" where the policy supplies bf16 compute to what is stored in fp32, or None.
        leaves_some_alone: whether some of several models, but not all, are left to PEFT or quantized.
        monitor: every so many steps, the share of weights left unchanged; 0 never.
    """

    option: str
    fix: str = _NOT_IN_16_BITS
    asked: str = ""
    added: bool = False
    action: Action = "warn"
    sample: int | None = None
    confirms: bool = False
    set_over_checkpoint: bool = False
    compute_dtype: str | None = None
    leaves_some_alone: bool = False
    monitor: int = 0

    @property
    def watches(self) -> bool:
        """Whether there is anything to do while the job runs."""
        return self.action != "ignore" or self.confirms


def read(record: Record, option: str) -> Plan:
    """The plan of a job, from its record."""
    made = record.decisions
    left_alone = [decision for decision in made if decision.rule in FROZEN_BASE]
    frozen = len(left_alone) == len(made)
    action: Action = record.bf16_adam
    if frozen and action != "ignore":
        action = "count"
    fp32 = [decision for decision in made if decision.fp32]
    leaves_16_bits = all(decision.rule in FROZEN_BASE or _explicit_16(decision) for decision in made)
    fixes = [decision.fix for decision in made if decision.fix]
    return Plan(
        option=option,
        fix=" ".join(fixes) or _NOT_IN_16_BITS,
        asked=", ".join(f"{decision.key}={_word(decision.after)}" for decision in fp32) if len(fp32) == len(made) else "",
        added=any(decision.added for decision in made),
        action=action,
        sample=record.sample,
        confirms=bool(fp32) or (record.compute_dtype is not None and not leaves_16_bits),
        set_over_checkpoint=any(decision.rule == "set" and decision.loads_checkpoint_dtype for decision in made),
        compute_dtype=record.compute_dtype,
        leaves_some_alone=bool(left_alone) and not frozen,
        monitor=record.monitor_every,
    )


def _explicit_16(decision: Decision) -> bool:
    return decision.rule == "explicit_dtype" and not decision.fp32


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
