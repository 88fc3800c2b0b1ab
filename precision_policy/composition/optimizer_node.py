"""Which optimizer a config node configures, in the many shapes that real projects give it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig

from precision_policy.composition import config_tree, targets

_NAME_KEYS = ("name", "type")


@dataclass(frozen=True)
class ConfiguredOptimizer:
    """An optimizer as the config has it.

    Attributes:
        name: the dotted path of its class, or the name that stands there; empty where the node names none.
        is_torch_optim: whether it is one of ``torch.optim``.
        guessed_from: the name that was taken for the dotted path, or empty.
    """

    name: str
    is_torch_optim: bool
    guessed_from: str = ""

    def __str__(self) -> str:
        return f'{self.name} (a guess from the name "{self.guessed_from}")' if self.guessed_from else self.name


def find(value: Any) -> ConfiguredOptimizer | None:
    """The optimizer that a node, a bare name, or a list or mapping of several stands for; None for none of these.

    Of several, one from ``torch.optim`` is enough: fp32 storage is safe for all, and that one needs it. A mapping that names no
    optimizer still is the node of one: its name is empty.
    """
    if isinstance(value, DictConfig):
        return _named_below(value) or ConfiguredOptimizer("", False)
    return _named_by(value)


def _named_by(value: Any) -> ConfiguredOptimizer | None:
    if isinstance(value, str):
        return _by_name(value)
    if isinstance(value, ListConfig):
        return _of_several([config_tree.value(value, index) for index in range(len(value))])
    if isinstance(value, DictConfig):
        return _named_below(value)
    return None


def _named_below(node: DictConfig) -> ConfiguredOptimizer | None:
    path = targets.built(node)
    if path is not None:
        return ConfiguredOptimizer(path, targets.is_torch_optim(path))
    for key in _NAME_KEYS:
        name = config_tree.value(node, key)
        if isinstance(name, str):
            return _by_name(name)
    return _of_several([config_tree.value(node, key) for key in config_tree.keys(node)])


def _by_name(name: str) -> ConfiguredOptimizer | None:
    known = targets.guess(name)
    if known is None:
        return ConfiguredOptimizer(name, False) if name else None
    return ConfiguredOptimizer(known, True, guessed_from="" if known == name else name)


def _of_several(values: list[Any]) -> ConfiguredOptimizer | None:
    named = [_named_by(value) for value in values if isinstance(value, DictConfig)]
    found = [optimizer for optimizer in named if optimizer is not None]
    for optimizer in found:
        if optimizer.is_torch_optim:
            return optimizer
    return found[0] if found else None
