"""The decision table, one pure function: what the policy does to a job's storage dtype, and why.

Nothing here reads a config or knows of Hydra or torch. ``applying.py`` gathers the facts and applies the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from precision_policy.composition.model_node import DtypeKey, Model
from precision_policy.composition.optimizer_node import ConfiguredOptimizer
from precision_policy.composition.settings import Settings
from precision_policy.composition.spelling import BF16_FOR_FP32, fp32_like, is_fp32, yaml_word
from precision_policy.record import Decision


@dataclass(frozen=True)
class Facts:
    """What the table is asked about one model and its optimizer.

    Attributes:
        settings: those in force.
        model_path: where the model's node was looked for.
        optimizer_path: where the optimizer was looked for.
        model: the model's node, or None where there is none.
        optimizer: the optimizer, or None where there is none.
        peft: what makes PEFT on, or None when it is off.
        peft_setting: the setting by which PEFT is said not to be about this model; empty where the user named the path himself.
    """

    settings: Settings
    model_path: str
    optimizer_path: str
    model: Model | None
    optimizer: ConfiguredOptimizer | None
    peft: str | None = None
    peft_setting: str = ""


def decide(facts: Facts) -> Decision:
    """The first rule that holds, in the order of the table in ``docs/design.md``. Only ``set`` changes anything."""
    settings, model, optimizer = facts.settings, facts.model, facts.optimizer
    fix = _fp32_override(model, settings)
    anyway = f" (fp32 storage all the same: {fix})" if fix else ""
    # Where nobody judges the optimizer, nobody is said to.
    watched = "; the optimizer that the job builds is watched" if settings.bf16_adam != "ignore" else ""
    if settings.master_weights:
        watched = "; the optimizer that the job builds is to keep master weights of bf16 parameters"
    not_computed = "; no bf16 compute is supplied to it" if settings.compute_dtype else ""

    if facts.peft is not None:
        not_here = f" (not about this model: {facts.peft_setting}=null)" if facts.peft_setting else anyway
        why = f"PEFT is on ({facts.peft}), and a frozen base may stay in the checkpoint's dtype"
        return Decision("peft", None, None, None, f"{why}{not_computed}{not_here}", fix)
    if model is not None and model.quantized is not None:
        why = f"the model is quantized ({model.quantized}), and fp32 would undo what its dtype is for"
        return Decision("quantized", None, None, None, f"{why}{not_computed}{anyway}", fix)

    if model is None:
        return Decision("no_model", None, None, None, f"the config has no node `{facts.model_path}`{watched}")
    if optimizer is None:
        why = f"the config has no optimizer at `{facts.optimizer_path}`"
        return Decision("no_optimizer", None, None, None, f"{why}{watched}{anyway}", fix)
    if not optimizer.name:
        why = f"`{facts.optimizer_path}` does not name its optimizer"
        return Decision("not_torch_optim", None, None, None, f"{why}{watched}{anyway}", fix)
    if not optimizer.is_torch_optim:
        why = f"{optimizer} is no optimizer of torch.optim and may keep an fp32 master copy of its own"
        return Decision("not_torch_optim", None, None, None, f"{why}{anyway}", fix)

    for key in model.keys:
        if key.is_chosen:
            return _chosen(key, settings)
    if not model.keys:
        return Decision("no_dtype_key", None, None, None, f"{model.no_key}{watched}")
    key = model.keys[0]
    if key.takes_no_name:
        return Decision("no_dtype_key", None, None, None, f"{key.takes_no_name}{watched}")
    return _unchosen(key, model, optimizer, settings)


def _chosen(key: DtypeKey, settings: Settings) -> Decision:
    """The decision about a dtype that somebody chose: it stays."""
    if isinstance(key.value, bool):
        stores_fp32 = _value_of_fp32(key.path)
        stored_in_fp32 = key.value is stores_fp32
        way = "" if stores_fp32 is None else f"{key.override}={yaml_word(stores_fp32)}"
    else:
        stored_in_fp32 = is_fp32(key.value)
        way = "" if key.takes_no_name else f"{key.override}={_fp32_for(key, settings)}"
    start = key.unreadable or f"{key.path}={yaml_word(key.value)} was chosen and"
    other = f" (fp32 storage: {way})" if way and not stored_in_fp32 else ""
    why = f"{start} stays as it is{other}"
    return Decision("explicit_dtype", key.path, key.value, key.value, why, way, fp32=stored_in_fp32)


def _fp32_for(key: DtypeKey, settings: Settings) -> Any:
    """How fp32 is spelled where this value stands: as the user said, else as the value itself does."""
    if is_fp32(key.value):
        return key.value
    if "storage_dtype" in settings.chosen:
        return settings.storage_dtype
    return fp32_like(key.value) or settings.storage_dtype


def _unchosen(key: DtypeKey, model: Model, optimizer: ConfiguredOptimizer, settings: Settings) -> Decision:
    """The decision about a dtype that nobody chose and that can be written."""
    fix = _fp32_override(model, settings)
    keeps_none = f"{optimizer} keeps no fp32 master copy"
    loads = model.loads_checkpoint_dtype or key.value == "auto"
    if not settings.write:
        if settings.master_weights:
            keeps_none = f"{optimizer} is to keep master weights of bf16 parameters"
        why = f"{keeps_none}; write=false leaves the config as it is (fp32 storage: {fix})"
        return Decision("warn_only", key.path, key.value, key.value, why, fix, loads_checkpoint_dtype=loads)
    why = f"{keeps_none} (keep bf16: {key.override}={BF16_FOR_FP32[str(settings.storage_dtype)]})"
    if key.pointed_at:
        why += f"; it pointed at {key.pointed_at}, which names no dtype"
    if model.kernels_of_16_bits and not settings.compute_dtype:
        why += f"; {model.kernels_of_16_bits} takes 16 bits alone: the job must autocast, or use precision_policy=mixed"
    return Decision(
        "set",
        key.path,
        key.value,
        settings.storage_dtype,
        why,
        fix,
        fp32=True,
        added=not key.is_there,
        loads_checkpoint_dtype=loads,
    )


def _fp32_override(model: Model | None, settings: Settings) -> str:
    """The override that stores the model in fp32; empty where none is known."""
    if model is None or not model.keys or model.keys[0].takes_no_name:
        return ""
    return f"{model.keys[0].override}={settings.storage_dtype}"


def _value_of_fp32(path: str) -> bool | None:
    """What a switch of this path holds where it stores in fp32, told by its name; None where the name does not tell."""
    name = path.rpartition(".")[2]
    if "16" in name or "half" in name:
        return False
    if "32" in name:
        return True
    return None
