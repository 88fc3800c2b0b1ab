"""What the job is to do, read from the decision that is recorded in its config. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
        elsewhere: other keys that may choose the dtype, or empty.
        action: what an optimizer that would lose updates leads to; "count": only say what it holds.
        sample: how many elements the estimate may look at; see :func:`precision_policy.lost_updates`.
        confirms: whether the first step says what the weights are stored and computed in.
        set_over_checkpoint: whether the policy set fp32 where the checkpoint's own dtype would have been loaded.
        compute_dtype: "bfloat16" where the policy supplies bf16 compute to what is stored in fp32, or None.
        leaves_some_alone: whether some of several models, but not all, are left to PEFT or quantized.
        monitor: every so many steps, the share of weights left unchanged; 0 never.
        optimizer: the dotted path of the optimizer's node, for advice.
    """

    option: str
    fix: str = _NOT_IN_16_BITS
    asked: str = ""
    added: bool = False
    elsewhere: str = ""
    action: Action = "warn"
    sample: int | None = None
    confirms: bool = False
    set_over_checkpoint: bool = False
    compute_dtype: str | None = None
    leaves_some_alone: bool = False
    monitor: int = 0
    optimizer: str = "optimizer"

    @property
    def watches(self) -> bool:
        """Whether there is anything to do while the job runs."""
        return self.action != "ignore" or self.confirms


def decisions(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The decisions in the recorded node, one for each pair."""
    return list(node["decision"].values()) if node.get("pairs") else [node["decision"]]


def read(node: Mapping[str, Any], option: str) -> Plan:
    """The plan of a job, from the node ``precision_policy`` of its config."""
    made = decisions(node)
    rules = {one["rule"] for one in made}
    left_alone = {"peft", "quantized"}
    frozen = rules <= left_alone
    action: Action = node["bf16_adam"]
    if frozen and action != "ignore":
        action = "count" if any(one["found"] for one in made) else "ignore"
    fp32 = [one for one in made if one["fp32"]]
    leaves_16_bits = all(one["rule"] in left_alone or _explicit_16(one) for one in made)
    fixes = [one["fix"] for one in made if one["fix"]]
    elsewhere = ", ".join(dict.fromkeys(one["elsewhere"] for one in made if one["elsewhere"]))
    return Plan(
        option=option,
        fix=" ".join(fixes) or elsewhere or _NOT_IN_16_BITS,
        asked=", ".join(f"{one['key']}={_word(one['after'])}" for one in fp32) if len(fp32) == len(made) else "",
        added=any(one["added"] for one in made),
        elsewhere=elsewhere,
        action=action,
        sample=node["sample"],
        confirms=bool(fp32) or (node["compute_dtype"] is not None and not leaves_16_bits),
        set_over_checkpoint=any(one["rule"] == "set" and one["loads_checkpoint_dtype"] for one in made),
        compute_dtype=node["compute_dtype"],
        leaves_some_alone=bool(rules & left_alone) and not frozen,
        monitor=node["monitor"]["every"],
        optimizer=node["optimizer"],
    )


def line(decision: Mapping[str, Any]) -> str:
    """One decision as the text that reports it."""
    if decision["rule"] != "set":
        return f"nothing set ({decision['rule']}): {decision['reason']}"
    before = "unset" if decision["before"] is None else decision["before"]
    return f"{decision['key']}: {before} -> {decision['after']}: {decision['reason']}"


def found_nothing(decision: Mapping[str, Any]) -> bool:
    """Whether an explicit ``on`` does nothing because something was not found. That is worth a WARNING."""
    return decision["rule"] in ("no_model", "no_optimizer", "no_dtype_key", "target_takes_no_dtype")


def _explicit_16(decision: Mapping[str, Any]) -> bool:
    return decision["rule"] == "explicit_dtype" and not decision["fp32"]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
