"""Which optimizer a config node configures, in the many shapes that real projects give it."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig

from precision_policy.composition import config_tree, targets
from precision_policy.composition.decision import OptimizerFacts

_NAME_KEYS = ("name", "type")


def find(value: Any) -> OptimizerFacts | None:
    """The optimizer that a node, a bare name, or a list or mapping of several stands for; None for none of these.

    Of several, one from ``torch.optim`` is enough: fp32 storage is safe for all, and that one needs it.
    """
    if isinstance(value, str):
        return _by_name(value)
    if isinstance(value, ListConfig):
        return _of_several([config_tree.value(value, index) for index in range(len(value))])
    if not isinstance(value, DictConfig):
        return None
    path = targets.built(value)
    if path is not None:
        return OptimizerFacts(path, targets.is_torch_optim(path))
    for key in _NAME_KEYS:
        name = config_tree.value(value, key)
        if isinstance(name, str):
            return _by_name(name)
    return _of_several([config_tree.value(value, key) for key in config_tree.keys(value)])


def _by_name(name: str) -> OptimizerFacts | None:
    known = targets.guess(name)
    if known is None:
        return OptimizerFacts(f'"{name}"', False) if name else None
    return OptimizerFacts(known if known == name else f'{known} (a guess from the name "{name}")', True)


def _of_several(values: list[Any]) -> OptimizerFacts | None:
    found = [one for one in (find(value) for value in values if isinstance(value, DictConfig)) if one is not None]
    return next((one for one in found if one.torch_optim), found[0] if found else None)
