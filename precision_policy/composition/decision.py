"""The decision table, one pure function: what the policy does to a job's storage dtype, and why.

Nothing here knows of Hydra, OmegaConf or torch. ``applying.py`` gathers the facts from a config and applies the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

Rule = Literal[
    "no_model",
    "peft",
    "quantized",
    "no_optimizer",
    "not_torch_optim",
    "explicit_dtype",
    "no_dtype_key",
    "target_takes_no_dtype",
    "warn_only",
    "set",
]

ABOUT_THE_MODEL: Final[tuple[Rule, ...]] = ("set", "warn_only", "explicit_dtype", "quantized", "peft")
"""The rules that concern the job's model, the likeliest first. Advice is shown only if it leads to one of them."""

BF16_FOR_FP32 = {
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

_WATCHED = "the optimizer that the job builds is still watched"


@dataclass(frozen=True)
class DtypeField:
    """A dtype key of the model: one that is there, or one that can be added.

    Attributes:
        path: where it lives, dotted from the config's root.
        override: how the command line spells that path, with a ``+`` where Hydra wants one.
        value: what it holds; text for anything that is not plain.
        chosen: whether that is a choice: anything but null and "auto".
        there: whether the key is there; False for one that the policy would add.
        pointed_at: what an interpolation says between its braces, or None.
        note: the beginning of the reason, where "path=value was chosen" would not say it.
    """

    path: str
    override: str
    value: str | bool | int | float | None = None
    chosen: bool = False
    there: bool = True
    pointed_at: str | None = None
    note: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """The model's node, as far as the table asks.

    Attributes:
        dtypes: the dtype keys that are there or can be added, the one to write first.
        refusal: where there is none: the rule that says so, and why.
        quantized: what says that the model is quantized, or None.
        loads_checkpoint_dtype: whether an unset dtype means the checkpoint's own, mostly bf16.
        fp16_kernels: attention kernels that were asked for and take 16 bits alone, or None.
    """

    dtypes: tuple[DtypeField, ...]
    refusal: tuple[Rule, str] | None = None
    quantized: str | None = None
    loads_checkpoint_dtype: bool = False
    fp16_kernels: str | None = None

    @property
    def override(self) -> str | None:
        """How the command line spells the model's dtype key; None where there is none."""
        return self.dtypes[0].override if self.dtypes else None


@dataclass(frozen=True)
class OptimizerFacts:
    """The optimizer as configured: its name, or a clause about one that is not torch's; and whether it is torch's."""

    name: str
    torch_optim: bool


@dataclass(frozen=True)
class Facts:
    """What the table is asked about. All of it is plain data.

    Attributes:
        model: the model's node, or a clause that says what is there instead.
        optimizer: the optimizer, or a clause that says what is there instead.
        peft: what makes PEFT on, or None when it is off.
        peft_setting: how to say that PEFT is not about this model; empty where the user named the path himself.
        fp32: the value to set, in the project's spelling of float32.
        write: whether it is written.
        compute_dtype: the compute dtype that the policy supplies, or None.
        advice: the end of the reason where something is missing: one line to paste, or what there is to choose from.
    """

    model: ModelFacts | str
    optimizer: OptimizerFacts | str
    peft: str | None = None
    peft_setting: str = ""
    fp32: str | int = "float32"
    write: bool = True
    compute_dtype: str | None = None
    advice: str = ""


@dataclass(frozen=True)
class Decision:
    """What was decided, and what the job needs to know of it.

    Attributes:
        rule: the rule that held first.
        key: the dotted path of the dtype key that it is about, or None.
        before, after: that key's value before and after.
        reason: one sentence why.
        fix: what to type for fp32 storage; empty where nothing in the config is known to set it.
        fp32: whether the config now asks for fp32 storage.
        added: whether the policy added the key where none was.
        loads_checkpoint_dtype: whether the unset key would have meant the checkpoint's own dtype.
        found: whether PEFT or quantization was found by looking, and not at a path that the user set.
        elsewhere: overrides of other keys that look as if they chose the model's dtype.
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
    found: bool = False
    elsewhere: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The record that goes into the config."""
        return dict(self.__dict__)


def decide(facts: Facts) -> Decision:
    """The first rule that holds. Only ``set`` changes anything."""
    model, optimizer = facts.model, facts.optimizer
    if isinstance(model, str):
        also = f"; {optimizer}" if isinstance(optimizer, str) else ""
        return Decision("no_model", None, None, None, f"{model}{also}; {_WATCHED}{facts.advice}")
    fix = f"{model.override}={facts.fp32}" if model.override else ""
    return (
        _frozen_base(facts, model, fix)
        or _no_torch_optimizer(facts, fix)
        or _chosen_dtype(facts, model, fix)
        or _writable(facts, model, fix)
    )


def _frozen_base(facts: Facts, model: ModelFacts, fix: str) -> Decision | None:
    anyway = _anyway(fix)
    also = "; no bf16 compute is supplied to it" if facts.compute_dtype else ""
    if facts.peft is not None:
        not_here = f" (not about this model: {facts.peft_setting}=null)" if facts.peft_setting else ""
        reason = f"PEFT is on ({facts.peft}), and a frozen base may stay in the checkpoint's dtype{also}{not_here or anyway}"
        return Decision("peft", None, None, None, reason, fix, found=bool(facts.peft_setting))
    if model.quantized is not None:
        reason = f"the model is quantized ({model.quantized}), and fp32 would undo what its dtype is for{also}"
        return Decision("quantized", None, None, None, reason, fix, found=True)
    return None


def _no_torch_optimizer(facts: Facts, fix: str) -> Decision | None:
    optimizer = facts.optimizer
    if isinstance(optimizer, str):
        return Decision("no_optimizer", None, None, None, f"{optimizer}; {_WATCHED}{_anyway(fix)}{facts.advice}", fix)
    if not optimizer.torch_optim:
        return Decision("not_torch_optim", None, None, None, f"{optimizer.name}{_anyway(fix)}", fix)
    return None


def _chosen_dtype(facts: Facts, model: ModelFacts, fix: str) -> Decision | None:
    field = next((field for field in model.dtypes if field.chosen), None)
    if field is None:
        return None
    start = field.note or f"{field.path}={yaml_word(field.value)} was chosen and"
    if isinstance(field.value, bool):
        stores_fp32 = _true_means_fp32(field.path)
        is_fp32 = field.value is stores_fp32
        way = "" if stores_fp32 is None else f"{field.override}={yaml_word(stores_fp32)}"
    else:
        is_fp32 = str(field.value) in BF16_FOR_FP32
        way = f"{field.override}={facts.fp32}"
    other = f" (fp32 storage: {way})" if way and not is_fp32 else ""
    reason = f"{start} stays as it is{other}"
    return Decision("explicit_dtype", field.path, field.value, field.value, reason, way, fp32=is_fp32)


def _true_means_fp32(path: str) -> bool | None:
    """Whether a switch stores in fp32 when it is true, told by its name; None where the name does not tell."""
    name = path.rpartition(".")[2]
    return False if "16" in name or "half" in name else True if "32" in name else None


def _writable(facts: Facts, model: ModelFacts, fix: str) -> Decision:
    if model.refusal is not None:
        rule, why = model.refusal
        return Decision(rule, None, None, None, f"{why}{facts.advice}")
    assert isinstance(facts.optimizer, OptimizerFacts)
    field = model.dtypes[0]
    keeps_none = f"{facts.optimizer.name} keeps no fp32 master copy"
    loads = model.loads_checkpoint_dtype or field.value == "auto"
    if not facts.write:
        reason = f"{keeps_none}, but this option only warns (fp32 storage: {fix})"
        return Decision("warn_only", field.path, field.value, field.value, reason, fix, loads_checkpoint_dtype=loads)
    pointed = f"; it pointed at {field.pointed_at}, which names no dtype" if field.pointed_at else ""
    kernels = ""
    if model.fp16_kernels and not facts.compute_dtype:
        kernels = f"; {model.fp16_kernels} takes 16 bits alone: the job must autocast, or use precision_policy=mixed"
    reason = f"{keeps_none} (keep bf16: {field.override}={BF16_FOR_FP32[str(facts.fp32)]}){pointed}{kernels}"
    path, before, added = field.path, field.value, not field.there
    return Decision("set", path, before, facts.fp32, reason, fix, fp32=True, added=added, loads_checkpoint_dtype=loads)


def _anyway(fix: str) -> str:
    return f" (fp32 storage all the same: {fix})" if fix else ""


def yaml_word(value: Any) -> str:
    """A plain value as YAML and the command line spell it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
