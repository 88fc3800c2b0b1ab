"""Which optimizer a config node configures, in the many shapes that real projects give it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig

from precision_policy import targets, tree

# Their result is what ``path`` names. The last is where hydra-zen's ``just(...)`` leads.
_GETTERS = {
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "hydra.utils.get_object",
    "hydra.utils.get_static_method",
    "hydra_zen.funcs.get_obj",
}
_WRAPPERS = {
    "hydra_zen.funcs.zen_processing": "_zen_target",
    "torch.distributed.optim.ZeroRedundancyOptimizer": "optimizer_class",
    "torch.distributed.optim.zero_redundancy_optimizer.ZeroRedundancyOptimizer": "optimizer_class",
}
_NAME_KEYS = ("name", "type")


@dataclass(frozen=True)
class Found:
    """An optimizer as configured.

    Attributes:
        name: what it is called in a sentence, a guess said to be one.
        torch_optim: whether it ships in ``torch.optim``.
    """

    name: str
    torch_optim: bool


def target(node: DictConfig) -> str | None:
    """The dotted path of what the node's ``_target_`` really builds, wrappers looked through; None without one."""
    path = targets.dotted(tree.value(node, "_target_"))
    if path in _GETTERS:
        return _target_of(tree.value(node, "path"))
    if path in _WRAPPERS:
        return _target_of(tree.value(node, _WRAPPERS[path]))
    return path


def _target_of(value: Any) -> str | None:
    return target(value) if isinstance(value, DictConfig) else targets.dotted(value)


def find(value: Any) -> Found | None:
    """The optimizer that a node, a bare name, or a list or mapping of several stands for; None for none of these.

    Of several, one from ``torch.optim`` is enough: fp32 storage is safe for all, and that one needs it.
    """
    if isinstance(value, str):
        return _by_name(value)
    if isinstance(value, ListConfig):
        return _of_several([tree.value(value, index) for index in range(len(value))])
    if not isinstance(value, DictConfig):
        return None
    path = target(value)
    if path is not None:
        return Found(path, targets.is_torch_optim(path))
    for key in _NAME_KEYS:
        name = tree.value(value, key)
        if isinstance(name, str):
            return _by_name(name)
    return _of_several([tree.value(value, key) for key in tree.keys(value)])


def _by_name(name: str) -> Found | None:
    known = targets.guess(name)
    if known is None:
        return Found(f'"{name}"', False) if name else None
    return Found(known if known == name else f'{known} (a guess from the name "{name}")', True)


def _of_several(values: list[Any]) -> Found | None:
    found = [one for one in (find(value) for value in values if isinstance(value, DictConfig)) if one is not None]
    return next((one for one in found if one.torch_optim), found[0] if found else None)
