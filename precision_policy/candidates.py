"""What a config has elsewhere, when there is nothing at the paths that were looked at: for the reason to name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from precision_policy import optimizer_node, targets, tree

# Below these, a dtype key is the compute dtype and not the storage dtype.
_COMPUTE = frozenset({"engine", "rollout", "amp", "fsdp", "fsdp_config", "autocast", "mixed_precision", "hydra"})
_MOST = 3


def models(cfg: DictConfig, keys: Sequence[str]) -> list[str]:
    """The paths of a few nodes that look like a model's: they hold a dtype key, or call one of the usual factories."""

    def fits(node: DictConfig) -> bool:
        return any(tree.has(node, key) for key in keys) or targets.is_factory(str(tree.plain(node, "_target_")))

    return _paths(cfg, fits)


def optimizers(cfg: DictConfig) -> list[str]:
    """The paths of a few nodes whose target is an optimizer of ``torch.optim``."""
    return _paths(cfg, lambda node: targets.is_torch_optim(optimizer_node.target(node)))


def _paths(cfg: DictConfig, fits: Callable[[DictConfig], bool]) -> list[str]:
    found = (path or tree.ROOT for path, node in tree.walk(cfg) if not _COMPUTE & set(path.split(".")) and fits(node))
    return [path for path in found if not path.startswith("precision_policy")][:_MOST]
