"""What to type instead, where the paths that were looked at lead nowhere. A line is tried before it is told."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from omegaconf import DictConfig, ListConfig

from precision_policy.composition import config_tree, model_node, targets
from precision_policy.composition.decision import ABOUT_THE_MODEL, BF16_FOR_FP32, UNCHOSEN, Decision
from precision_policy.composition.settings import SettingError, Settings

# A dtype key below these is a compute dtype or another model's, not the storage dtype of the model that trains.
_COMPUTE: Final = {"engine", "amp", "fsdp", "fsdp_config", "autocast", "mixed_precision"}
_OTHER_ROLES: Final = re.compile(
    r"(^|[_.])(tokenizer|processor|feature_extractor|rollout|vllm|sglang|inference|infer|generation|ref|reference|reward|rm|teacher"
    r"|judge|vae|ema)([_.]|$)",
    re.IGNORECASE,
)
_OTHER_TARGETS: Final = re.compile(r"tokenizer|processor|featureextractor|vllm|sglang|scheduler|dataset", re.IGNORECASE)
_MODEL_NAMES: Final = {"model", "net", "network", "backbone", "policy", "actor", "llm", "lm", "module", "student"}
_OPTIMIZER_NAMES: Final = {"optimizer", "optim", "opt", "optimizer_name", "optim_name", "optimizer_type"}
_DTYPE_KEY: Final = re.compile(r"(\w+_)?dtype|precision|load_as_\w+|use_bf16|load_bf16", re.IGNORECASE)
_FP32_FOR_BF16: Final = {bf16: fp32 for fp32, bf16 in reversed(BF16_FOR_FP32.items())}
_MOST: Final = 8  # candidates of a kind that are tried
_SHOWN: Final = 3


def line(cfg: DictConfig, settings: Settings, decide: Callable[[Settings], Decision]) -> str | None:
    """The settings to add so that the policy decides about the job's model, in one line; None where none was found.

    Args:
        cfg: the composed config.
        settings: those in force. What the user chose among them stays.
        decide: the decision under other settings; it writes nothing.
    """
    optimizers = [settings.optimizer] if "optimizer" in settings.chosen else _optimizers(cfg, settings)
    models = [settings.model] if "model" in settings.chosen else _nearest_first(_models(cfg, settings), optimizers)
    tried: list[tuple[int, str]] = []
    node = config_tree.select(cfg, settings.model)
    if isinstance(node, DictConfig) and not config_tree.has(node, "_target_"):
        models.insert(0, settings.model)  # what it lacks may be a key of the project's own
    for model, optimizer in itertools.product(models, optimizers):
        for key in _dtype_keys(cfg, model, settings):
            changed: dict[str, Any] = {"model": model, "optimizer": optimizer, "dtype_key": key}
            words = [f"precision_policy.{name}={value}" for name, value in changed.items() if value != getattr(settings, name)]
            chosen = settings.chosen | {name for name, value in changed.items() if value != getattr(settings, name)}
            try:
                rule = decide(replace(settings, **changed, chosen=frozenset(chosen))).rule
            except SettingError:
                continue
            if words and rule in ABOUT_THE_MODEL:
                tried.append((ABOUT_THE_MODEL.index(rule), " ".join(words)))
    return min(tried, key=lambda one: one[0])[1] if tried else None


def other_keys(cfg: DictConfig, decision: Decision, overrides: Sequence[str]) -> str:
    """Overrides of other keys that look as if they chose the model's dtype, each in its own spelling of fp32."""
    found = []
    for path, node in config_tree.mappings(cfg):
        if not _may_train(path):
            continue
        for key, _ in config_tree.children(node):
            where = f"{path}.{key}" if path else key
            if where != decision.key and _DTYPE_KEY.fullmatch(key):
                fp32 = _fp32_instead_of(key, config_tree.value(node, key))
                if fp32 is not None:
                    found.append(f"{model_node.spell(where, overrides)}={fp32}")
    return ", ".join(found[:_SHOWN])


def all_paths(cfg: DictConfig) -> list[str]:
    """The dotted path of everything in the application's own config."""
    return [
        f"{path}.{key}" if path else key for path, node in config_tree.mappings(cfg) for key, _ in config_tree.children(node)
    ]


def _fp32_instead_of(key: str, value: Any) -> str | None:
    """What to write in place of a value that stores in 16 bits, or that nobody chose; None where it is neither."""
    if key == "precision" and not str(value).endswith("-true"):  # Lightning's word: all but these store in fp32
        return None
    if isinstance(value, bool):
        return "false" if value else None
    if value in UNCHOSEN:
        return "float32"
    return _FP32_FOR_BF16.get(value.lower()) if isinstance(value, str) else None


def _may_train(path: str) -> bool:
    return not _COMPUTE & set(path.split(".")) and not _OTHER_ROLES.search(path)


def _models(cfg: DictConfig, settings: Settings) -> list[str]:
    """The nodes that may be the trained model's: those that load or name a dtype first, then those that are called so."""
    sure, perhaps = [], []
    for path, node in config_tree.mappings(cfg):
        target = str(targets.called(node) or "")
        if not _may_train(path) or _OTHER_TARGETS.search(target):
            continue
        keys = [key for key, _ in config_tree.children(node)]
        if targets.is_factory(target) or set(settings.keys) & set(keys):
            sure.append(path or config_tree.ROOT)
        elif path.rpartition(".")[2] in _MODEL_NAMES:
            perhaps.append(path or config_tree.ROOT)
    return (sure + perhaps)[:_MOST]


def _optimizers(cfg: DictConfig, settings: Settings) -> list[str]:
    """The nodes that build an optimizer of ``torch.optim``, and the keys that hold the name of one."""
    found = []
    for path, node in config_tree.mappings(cfg):
        if path and targets.is_torch_optim(targets.built(node)):
            found.append(path)
        for key, child in config_tree.children(node):
            value = None if isinstance(child, (DictConfig, ListConfig)) else config_tree.value(node, key)
            if key in _OPTIMIZER_NAMES and isinstance(value, str) and targets.guess(value):
                found.append(f"{path}.{key}" if path else key)
    found.sort(key=lambda path: path != settings.optimizer)
    return found[:_MOST]


def _nearest_first(models: list[str], optimizers: list[str]) -> list[str]:
    """The models in the order in which to try them: one beside or below the node that holds the optimizer is the likeliest."""
    holders = [path.rpartition(".")[0] for path in optimizers]
    return sorted(models, key=lambda path: not any(holder and path.startswith(f"{holder}.") for holder in holders))


def _dtype_keys(cfg: DictConfig, model: str, settings: Settings) -> Iterator[str | None]:
    """The dtype keys to try at a node: the settings' own, then the project's, also one mapping further down."""
    yield settings.dtype_key
    node = config_tree.select(cfg, model)
    if settings.dtype_key is not None or not isinstance(node, DictConfig):
        return
    for key, child in config_tree.children(node):
        if _is_dtype_key(node, key):
            yield key
        if isinstance(child, DictConfig) and _may_train(key):
            yield from (f"{key}.{below}" for below, _ in config_tree.children(child) if _is_dtype_key(child, below))


def _is_dtype_key(node: DictConfig, key: str) -> bool:
    """Whether a key looks like one that holds a dtype's name; a switch such as ``load_as_bf16: true`` holds none."""
    return bool(_DTYPE_KEY.fullmatch(key)) and not isinstance(config_tree.value(node, key), (bool, DictConfig, ListConfig))
