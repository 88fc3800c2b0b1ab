"""What was decided about a job, as it stands in ``hydra.precision_policy``: composition writes it, the job reads it.

Nothing here knows of Hydra, OmegaConf or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

Rule = Literal[
    "peft", "quantized", "no_model", "no_optimizer", "not_torch_optim", "explicit_dtype", "no_dtype_key", "warn_only", "set"
]
"""Why the storage dtype is what it is; ``docs/design.md`` has them in the order in which they are asked."""

FROZEN_BASE: Final[frozenset[Rule]] = frozenset({"peft", "quantized"})
"""The rules about a model of which most is frozen and may stay in 16 bits."""


@dataclass(frozen=True)
class Decision:
    """What was decided about one model, and what the job needs to know of it.

    Attributes:
        rule: the rule that held first.
        key: the dotted path of the dtype key that it is about, or None.
        before: that key's value before.
        after: that key's value after.
        reason: one sentence.
        fix: the override that stores the model in fp32; empty where none is known.
        fp32: whether the config asks for fp32 storage, after the decision.
        added: whether the policy added the key where there was none.
        loads_checkpoint_dtype: whether the model, left alone, is loaded in its checkpoint's own dtype.
    """

    rule: Rule
    key: str | None
    before: Any
    after: Any
    reason: str
    fix: str = ""
    fp32: bool = False
    added: bool = False
    loads_checkpoint_dtype: bool = False


@dataclass(frozen=True)
class Record:
    """The settings that the job acts on, and what was decided.

    Attributes:
        enabled: whether the policy acts at all.
        master_weights: whether fp32 master weights are kept of bf16 parameters.
        compute_dtype: ``"bfloat16"`` where bf16 compute is supplied to what is stored in fp32, or None.
        bf16_adam: what an optimizer that loses updates of bf16 weights leads to.
        sample: how many weights the warning's numbers are read from; None leaves it to the estimate.
        monitor_every: every so many steps, the share of weights left unchanged; 0 never.
        decisions: one for each model; empty where nothing was decided.
    """

    enabled: bool
    master_weights: bool
    compute_dtype: str | None
    bf16_adam: Literal["warn", "error", "ignore"]
    sample: int | None
    monitor_every: int
    decisions: tuple[Decision, ...]

    @classmethod
    def read(cls, node: Mapping[str, Any]) -> Record:
        """Read the node ``hydra.precision_policy`` of a composed config, as plain values."""
        decided = node.get("decision") or {}
        several = [decided] if "rule" in decided else list(decided.values())
        names = {field.name for field in fields(Decision)}
        decisions = []
        for values in several:
            decisions.append(Decision(**{name: values[name] for name in names}))
        return cls(
            enabled=node["enabled"],
            master_weights=node["master_weights"],
            compute_dtype=node["compute_dtype"],
            bf16_adam=node["bf16_adam"],
            sample=node["sample"],
            monitor_every=node["monitor"]["every"],
            decisions=tuple(decisions),
        )
