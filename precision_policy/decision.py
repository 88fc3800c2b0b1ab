"""The decision table, one pure function: what the policy does to a job's storage dtype, and why.

Nothing here knows of Hydra, OmegaConf or torch; ``policy.py`` gathers the facts from a config and applies the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Rule = Literal[
    "no_model",
    "peft",
    "no_optimizer",
    "not_torch_optim",
    "explicit_dtype",
    "target_takes_no_dtype",
    "warn_only",
    "set",
]

BF16_BESIDE = {
    "float32": "bfloat16",
    "fp32": "bf16",
    "torch.float32": "torch.bfloat16",
    "float": "bfloat16",
    "32": "bf16",
    "32-true": "bf16-true",
}
"""How projects spell fp32, and what each then calls bf16."""

UNCHOSEN = (None, "auto")
"""Values of a dtype key that nobody chose: ``transformers`` then loads whatever the checkpoint was saved in."""


@dataclass(frozen=True)
class DtypeField:
    """A dtype key that is there on the model node.

    Attributes:
        path: where it lives, dotted from the config's root.
        override: how the command line spells that path, with a ``+`` where Hydra wants one.
        value: what it holds; text for anything that is not plain.
        chosen: whether that is a choice: anything but null and "auto".
        pointed_at: what an interpolation says between its braces, or None.
        note: the beginning of the reason, where "path=value was chosen" would not say it.
    """

    path: str
    override: str
    value: str | bool | int | float | None
    chosen: bool
    pointed_at: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Room:
    """Whether a dtype key can be added where none is: its dotted path, or None and the reason why not."""

    path: str | None
    why_not: str = ""


@dataclass(frozen=True)
class Facts:
    """What the table is asked about.

    Attributes:
        no_model: where there is no model, a clause that says what is there instead.
        peft: what makes PEFT on, or None when it is off.
        optimizer: the optimizer's name, or for one that is not torch's a clause about it; None when there is no node.
        no_optimizer: where there is none, a clause that says what is there instead.
        override: how the command line spells the model's dtype key, for advice; None where it may take none.
        torch_optim: whether the optimizer ships in ``torch.optim``.
        dtypes: the dtype keys that are there, the one to write first; None when there is no model.
        room: whether an absent key can be added; a call, because finding out may import the model's class.
        storage_dtype: the value to set, in the project's spelling of float32; None never sets.
    """

    no_model: str
    peft: str | None
    optimizer: str | None
    no_optimizer: str
    override: str | None
    torch_optim: bool
    dtypes: tuple[DtypeField, ...] | None
    room: Callable[[], Room]
    storage_dtype: str | None


@dataclass(frozen=True)
class Decision:
    """What was decided: the rule that held first, the key it is about, its value before and after, one sentence why."""

    rule: Rule
    key: str | None
    before: Any
    after: Any
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The record that goes into the config."""
        return dict(self.__dict__)


def decide(facts: Facts) -> Decision:
    """The first rule that holds. Only ``set`` changes anything."""

    def nothing(rule: Rule, reason: str) -> Decision:
        return Decision(rule, None, None, None, reason)

    fp32 = facts.storage_dtype or "float32"
    anyway = f" (fp32 storage all the same: {facts.override}={fp32})" if facts.override else ""
    watched = "the optimizer that the job builds is still watched"
    if facts.dtypes is None:
        found = f"; {facts.no_optimizer}" if facts.optimizer is None else ""
        return nothing("no_model", f"{facts.no_model}{found}; {watched}")
    if facts.peft is not None:
        return nothing("peft", f"PEFT is on ({facts.peft}), and a frozen base may stay in the checkpoint's dtype{anyway}")
    if facts.optimizer is None:
        return nothing("no_optimizer", f"{facts.no_optimizer}; {watched}{anyway}")
    if not facts.torch_optim:
        return nothing("not_torch_optim", f"{facts.optimizer}{anyway}")
    for field in facts.dtypes:
        if field.chosen:
            start = field.note or f"{field.path}={field.value} was chosen and"
            already = "" if field.value == fp32 else f" (fp32 storage: {field.override}={fp32})"
            return Decision("explicit_dtype", field.path, field.value, field.value, f"{start} stays as it is{already}")

    if facts.dtypes:
        field = facts.dtypes[0]
    else:
        room = facts.room()
        if room.path is None:
            return nothing("target_takes_no_dtype", room.why_not)
        field = DtypeField(room.path, f"+{room.path}", None, chosen=False)
    keeps_none = f"{facts.optimizer} keeps no fp32 master copy"
    if facts.storage_dtype is None:
        reason = f"{keeps_none}, but this option only warns (fp32 storage: {field.override}={fp32})"
        return Decision("warn_only", field.path, field.value, field.value, reason)
    pointed = f"; it pointed at {field.pointed_at}, which names no dtype" if field.pointed_at else ""
    reason = f"{keeps_none} (keep bf16: {field.override}={BF16_BESIDE[fp32]}){pointed}"
    return Decision("set", field.path, field.value, fp32, reason)
