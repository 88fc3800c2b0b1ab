"""Whether PEFT is on or the model is quantized. Real configs keep whole blocks that one key inside or beside switches off."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from omegaconf import DictConfig, ListConfig

from precision_policy.composition import config_tree

_RANKS: Final = ("r", "rank", "lora_r", "lora_rank")
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
    return None if _is_off(parent, f"use_{name}") else _on_at_key(parent, name, path)


def on_anywhere(root: DictConfig, but: Collection[str] = ()) -> str | None:
    """What in the whole config switches PEFT on, by the names that real projects use; None when nothing does.

    Args:
        root: the config.
        but: dotted paths that are known to be about another model.
    """
    return _below(root, "", but)


def quantized(model: DictConfig, path: str) -> str | None:
    """What says that the model is quantized, on its node or just below; None when nothing does."""
    nodes = [(path, model)]
    nodes += [(f"{path}.{key}", child) for key, child in config_tree.children(model) if isinstance(child, DictConfig)]
    for where, node in nodes:
        for key, _ in config_tree.children(node):
            if key in _QUANTIZED:
                found = _on_at_key(node, key, f"{where}.{key}".lstrip("."))
                if found is not None:
                    return found
    return None


def _below(node: Any, path: str, but: Collection[str]) -> str | None:
    """The first thing that is on in a node, in the order of the config. A switch that is off speaks for all below it."""
    entries = list(config_tree.children(node))
    is_mapping = isinstance(node, DictConfig)
    if is_mapping and any(key in _SWITCHES and _is_off(node, key) for key, _ in entries):
        return None
    for key, child in entries:
        if not path and key in config_tree.NOT_THE_JOBS:
            continue
        where = f"{path}.{key}" if path else key
        if where in but:
            continue
        if is_mapping and _is_about_peft(node, key):
            found = None if _is_off(node, f"use_{key}") else _on_at_key(node, key, where)
            if found is not None:
                return found
        elif isinstance(child, (DictConfig, ListConfig)):
            found = _below(child, where, but)
            if found is not None:
                return found
    return None


def _is_about_peft(node: DictConfig, key: str) -> bool:
    if key in _NAMES:
        return True
    if key in _CHOICES:
        return str(config_tree.value(node, key)).strip().lower() in _METHODS
    # A block's own target, where its name does not tell: `adapter: {_target_: peft.LoraConfig}`.
    return key == "_target_" and str(config_tree.raw_value(node, key)).startswith("peft.") and not _is_switched_off(node, "")


def _on_at_key(parent: DictConfig, name: str, path: str) -> str | None:
    found = config_tree.value(parent, name)
    if found is config_tree.ABSENT:
        return f"{path} is not known before the job runs"
    return _on(found, path, name)


def _on(found: Any, path: str, name: str) -> str | None:
    if isinstance(found, ListConfig):
        return f"{path} is there" if len(found) else None
    if not isinstance(found, DictConfig):
        text = found.strip().lower() if isinstance(found, str) else found
        return None if text in (None, False, 0, *_OFF_WORDS) else f"{path}={found}"
    if not config_tree.keys(found) or _is_switched_off(found, name):
        return None
    return f"{path} is there"


def _is_switched_off(block: DictConfig, name: str) -> bool:
    if config_tree.has(block, "_target_") and config_tree.value(block, "_target_") is None:
        return True
    return any(_is_off(block, key) for key in ("enabled", "enable", f"use_{name}", *_RANKS))


def _is_off(node: DictConfig, key: str) -> bool:
    """Whether the key is there and holds false or rank 0."""
    if not config_tree.has(node, key):
        return False
    value: Any = config_tree.value(node, key)
    return isinstance(value, (bool, int, float)) and not value
