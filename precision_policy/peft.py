"""Whether PEFT is on: real configs keep whole PEFT blocks that are switched off by one key inside or beside them."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from precision_policy import tree

_RANKS = ("r", "rank", "lora_rank")


def what_is_on(root: DictConfig, path: str) -> str | None:
    """What at ``path`` switches PEFT on, in words for the decision's reason; None when PEFT is off.

    Off are: nothing there, null, false, 0, "", "none", ``{}``, a block whose ``_target_`` is null, ``enabled: false``,
    rank 0, and ``use_<name>: false`` inside or beside the block. Anything else is on, what cannot be read included: when
    in doubt the policy leaves the config alone.
    """
    parent_path, _, name = path.rpartition(".")
    parent = tree.at(root, parent_path) if parent_path else root
    if not isinstance(parent, DictConfig) or not tree.has(parent, name):
        found = tree.at(root, path)  # an index into a list, say
        if found is tree.ABSENT:
            return None
    else:
        found = tree.value(parent, name)
        if _is_off(parent, f"use_{name}"):
            return None
        if found is tree.ABSENT:
            return f"{path} is not known before the job runs"
    if not isinstance(found, DictConfig):
        text = found.strip().lower() if isinstance(found, str) else found
        return None if text in (None, False, 0, "", "none") else f"{path}={found}"
    if not tree.keys(found):
        return None
    if tree.has(found, "_target_") and tree.value(found, "_target_") is None:
        return None
    switches = ("enabled", f"use_{name}", *_RANKS)
    return None if any(_is_off(found, key) for key in switches) else f"{path} is there"


def _is_off(node: DictConfig, key: str) -> bool:
    """Whether the key is there and holds false or rank 0."""
    if not tree.has(node, key):
        return False
    value: Any = tree.value(node, key)
    return isinstance(value, (bool, int, float)) and not value
