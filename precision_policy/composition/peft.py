"""Whether PEFT is on or the model is quantized. Real configs keep whole blocks that one key inside or beside switches off.

Names are compared without regard to the case of their letters: projects write ``LoRA`` as well as ``lora``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from omegaconf import DictConfig, ListConfig

from precision_policy.composition import config_tree

_RANKS: Final = frozenset({"r", "rank", "lora_r", "lora_rank"})
_METHODS: Final = frozenset(
    {"lora", "qlora", "dora", "adalora", "ia3", "loha", "lokr", "vera", "prefix_tuning", "prompt_tuning"}
)
_SWITCHES: Final = frozenset({"use_peft", "use_lora", "use_qlora", "use_dora", "enable_lora", "enable_peft"})
# A key of one of these names is about PEFT, whatever it holds.
_NAMES: Final = (
    frozenset({"peft", "lora", "qlora", "dora", "peft_config", "lora_config", "peft_scheme", "peft_type", "peft_method"})
    | frozenset({"lora_r", "lora_rank", "peft_args", "lora_args", "lora_cfg", "peft_cfg"})
    | _SWITCHES
)
# A key of one of these names is about PEFT where it holds the name of a method.
_CHOICES: Final = frozenset({"finetuning_type", "tuner_type", "train_type", "training_type", "adapter", "finetune_method"})
_QUANTIZED: Final = (
    frozenset({"load_in_4bit", "load_in_8bit"})
    | frozenset({"quantization_config", "quantization", "bnb_config", "bnb", "quant_config"})
)  # fmt: skip
_OFF_WORDS: Final = ("", "none", "no", "off", "false", "null", "full")

# What stands below a node of one of these names is about a model that is not trained, or not by this optimizer.
_OTHER_ROLES: Final = (
    frozenset({"ref", "reference", "reward", "rm", "teacher", "critic", "judge"})
    | frozenset({"rollout", "inference", "infer", "vllm", "sglang"})
)  # fmt: skip
# A node that is named for one of these too, as in actor_rollout_ref, is about the trained model as well.
_TRAINED_ROLES: Final = frozenset({"actor", "student"})


def on_at(root: DictConfig, path: str) -> str | None:
    """What at ``path`` switches PEFT on, in words for the decision's reason; None when PEFT is off there.

    Off are: nothing there, null, false, 0, "", "none", ``{}``, a block whose ``_target_`` is null, ``enabled: false``,
    rank 0, and ``use_<name>: false`` inside or beside the block. Anything else is on, what cannot be read included: when
    in doubt the policy leaves the config alone.
    """
    parent, name = config_tree.parent_and_name(root, path)
    if parent is None or not config_tree.has(parent, name):
        found = config_tree.select(root, path)  # an index into a list, say
        return None if found is config_tree.ABSENT else _on(found, path, name)
    return None if _is_off(parent, {f"use_{name.lower()}"}) else _on_at_key(parent, name, path)


def on_anywhere(root: DictConfig, models: Collection[str] = (), but: Collection[str] = ()) -> str | None:
    """What in the config switches PEFT on for the trained model, by the names that projects use; None when nothing does.

    What stands below a node of another role, such as ``ref_model``, does not count, unless the trained model stands there too.

    Args:
        root: the config.
        models: the dotted paths of the trained model.
        but: dotted paths that are known to be about another model.
    """
    return _below(root, "", models, but)


def quantized(model: DictConfig, path: str) -> str | None:
    """What says that the model is quantized, on its node or just below; None when nothing does."""
    nodes = [(path, model)]
    for key, child in config_tree.children(model):
        if isinstance(child, DictConfig):
            nodes.append((f"{path}.{key}", child))
    for where, node in nodes:
        for key, _ in config_tree.children(node):
            if key.lower() in _QUANTIZED:
                found = _on_at_key(node, key, f"{where}.{key}".lstrip("."))
                if found is not None:
                    return found
    return None


def _below(node: Any, path: str, models: Collection[str], but: Collection[str]) -> str | None:
    """The first thing that is on in a node, in the order of the config; a switch that is off speaks for its whole node."""
    is_mapping = isinstance(node, DictConfig)
    if is_mapping and _is_off(node, _SWITCHES):
        return None
    for key, child in config_tree.children(node):
        where = f"{path}.{key}" if path else key
        if where in but or where in config_tree.NOT_THE_JOBS:
            continue
        found = None
        if is_mapping and _is_about_peft(node, key):
            if not _is_off(node, {f"use_{key.lower()}"}):
                found = _on_at_key(node, key, where)
        elif isinstance(child, (DictConfig, ListConfig)) and not _is_about_another_model(key, where, models):
            found = _below(child, where, models, but)
        if found is not None:
            return found
    return None


def _is_about_another_model(key: str, path: str, models: Collection[str]) -> bool:
    words = set(key.lower().split("_"))
    if not words & _OTHER_ROLES or words & _TRAINED_ROLES:
        return False
    return not any(model == path or model.startswith(f"{path}.") for model in models)


def _is_about_peft(node: DictConfig, key: str) -> bool:
    if key.lower() in _NAMES:
        return True
    if key.lower() in _CHOICES:
        return str(config_tree.value(node, key)).strip().lower() in _METHODS
    # A block's own target, where its name does not tell: `adapter: {_target_: peft.LoraConfig}`.
    return key == "_target_" and str(config_tree.raw_value(node, key)).startswith("peft.") and not _is_switched_off(node, "")


def _on_at_key(parent: DictConfig, name: str, path: str) -> str | None:
    """As :func:`_on`, of what a key holds; a value that cannot be read yet is on."""
    found = config_tree.value(parent, name)
    if found is config_tree.ABSENT:
        return f"{path} is not known before the job runs"
    return _on(found, path, name)


def _on(found: Any, path: str, name: str) -> str | None:
    """What a flag, rank, method, list or block switches on, in words; None where it is off."""
    if isinstance(found, ListConfig):
        return f"{path} is there" if len(found) else None
    if not isinstance(found, DictConfig):
        text = found.strip().lower() if isinstance(found, str) else found
        return None if text in (None, False, 0, *_OFF_WORDS) else f"{path}={found}"
    if not config_tree.keys(found) or _is_switched_off(found, name):
        return None
    return f"{path} is there"


def _is_switched_off(block: DictConfig, name: str) -> bool:
    """Whether a key of a block, which has this name, switches the block itself off: a null target, a switch, or rank 0."""
    if config_tree.has(block, "_target_") and config_tree.value(block, "_target_") is None:
        return True
    return _is_off(block, {"enabled", "enable", f"use_{name.lower()}", *_RANKS})


def _is_off(node: DictConfig, names: Collection[str]) -> bool:
    """Whether a key of one of these names is there and holds false or rank 0."""
    for key in config_tree.keys(node):
        if key.lower() in names:
            value: Any = config_tree.value(node, key)
            if isinstance(value, (bool, int, float)) and not value:
                return True
    return False
