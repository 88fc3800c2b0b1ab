"""From a composed config to its decision and back: gathers the facts, asks the table, writes what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from precision_policy.composition import config_tree, model_node, optimizer_node, peft
from precision_policy.composition.decision import Facts, decide
from precision_policy.composition.optimizer_node import ConfiguredOptimizer
from precision_policy.composition.settings import AUTO, NODE, Pair, Path, SettingError, Settings, nearest_name, parse
from precision_policy.record import Decision


def apply(
    cfg: DictConfig, given: Mapping[str, Any], overrides: Sequence[str], saved: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Decide, and write the dtype where that is the decision.

    Args:
        cfg: the whole composed config, changed in place.
        given: the settings that somebody set, by name.
        overrides: the job's command-line overrides, for the spelling of advice.
        saved: the decision of an earlier run of this config, which stays where the config still has what it set.

    Returns:
        The record: every setting, and the decision.

    Raises:
        SettingError: a setting that cannot be right.
    """
    settings = parse(given)
    record: dict[str, Any] = {**settings.as_dict(), "decision": None}
    if not settings.enabled:
        return record
    decisions: dict[str | None, Any] = {}
    for name, pair in settings.each_pair().items():
        decision = _kept(cfg, saved, name)
        if decision is None:
            decision = decide(_gather(cfg, settings, pair, overrides))
            if decision.rule == "set":
                _set(cfg, decision)
        decisions[name] = asdict(decision)
    record["decision"] = decisions.get(None, decisions)
    return record


def read_settings(node: DictConfig) -> dict[str, Any]:
    """The settings in a node as plain values; ``???`` stands for one that was left alone.

    Raises:
        SettingError: an interpolation leads nowhere.
    """
    given = {}
    for key in config_tree.keys(node):
        if config_tree.is_missing(node, key):
            continue
        value = config_tree.value(node, key)
        if value is config_tree.ABSENT:
            problem, fix = "it cannot be resolved", "Point it at something that the config has."
            raise SettingError(f"{NODE}.{key}", config_tree.raw_value(node, key), problem, fix)
        given[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return given


def _kept(cfg: DictConfig, saved: Mapping[str, Any] | None, name: str | None) -> Decision | None:
    """The saved decision, where the dtype that it set is still there; else None."""
    decision = saved if name is None or saved is None else saved.get(name)
    if not isinstance(decision, Mapping) or decision.get("rule") != "set":
        return None
    if set(decision) != {field.name for field in fields(Decision)}:
        return None
    if config_tree.select(cfg, decision["key"]) != decision["after"]:
        return None
    return Decision(**decision)


def _gather(cfg: DictConfig, settings: Settings, pair: Pair, overrides: Sequence[str]) -> Facts:
    """What the table is asked about one model; PEFT is looked for where it was said to be, or everywhere but at the others'."""
    model = _find_model(cfg, pair.model)
    looks_everywhere = pair.peft.path == AUTO
    if looks_everywhere:
        others = [other.peft.path for other in settings.each_pair().values() if other.peft.path]
        is_on = peft.on_anywhere(cfg, _paths_of_model(pair.model, model), but=others)
    elif pair.peft.path:
        if pair.peft.chosen and not config_tree.exists(cfg, pair.peft.path):
            raise _leads_nowhere(cfg, pair.peft)
        is_on = peft.on_at(cfg, pair.peft.path)
    else:
        is_on = None
    return Facts(
        settings=settings,
        model_path=pair.model.path,
        optimizer_path=pair.optimizer.path,
        model=None if model is None else model_node.describe(model, settings, overrides),
        optimizer=_find_optimizer(cfg, pair.optimizer),
        peft=is_on,
        peft_setting=pair.peft.setting if looks_everywhere else "",
    )


def _find_model(cfg: DictConfig, at: Path) -> DictConfig | None:
    found = config_tree.select(cfg, at.path)
    if isinstance(found, DictConfig):
        return found
    if at.chosen:
        raise _unusable(cfg, at, found, "holds no mapping", "Name the node that configures the model.")
    return None


def _paths_of_model(at: Path, model: DictConfig | None) -> list[str]:
    """Where the model stands: as it was named, and where an interpolation leads."""
    return [at.path] if model is None else [at.path, config_tree.path_of(model)]


def _find_optimizer(cfg: DictConfig, at: Path) -> ConfiguredOptimizer | None:
    value = config_tree.select(cfg, at.path)
    found = optimizer_node.find(value)
    if found is None and at.chosen:
        fix = "Name the optimizer's node, or the key that holds its name."
        raise _unusable(cfg, at, value, "holds neither a mapping nor a name", fix)
    return found


def _unusable(cfg: DictConfig, at: Path, found: Any, what: str, fix: str) -> SettingError:
    if found is config_tree.ABSENT and not config_tree.exists(cfg, at.path):
        return _leads_nowhere(cfg, at)
    return SettingError(at.setting, at.path, f"{at.path} {what}", fix)


def _leads_nowhere(cfg: DictConfig, at: Path) -> SettingError:
    """The error for a path that does not exist: the path that was probably meant, and what is there."""
    near = nearest_name(at.path, config_tree.all_paths(cfg))
    meant = f"Did you mean {at.setting}={near}? " if near else ""
    return SettingError(at.setting, at.path, f"the config has no {at.path}", f"{meant}{_what_exists(cfg, at.path)}.")


def _what_exists(root: DictConfig, path: str) -> str:
    """A clause that names the longest part of ``path`` that exists, and the keys that are there."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:length])
        found = config_tree.select(root, prefix)
        if isinstance(found, DictConfig):
            return f"{prefix} exists and holds: {_names(found)}"
        if found is not config_tree.ABSENT:
            return f"{prefix} exists but is no mapping"
    return f"The config holds at its top: {_names(root)}"


def _names(node: DictConfig) -> str:
    return ", ".join(key for key in config_tree.keys(node) if key not in config_tree.NOT_THE_JOBS) or "nothing"


def _set(cfg: DictConfig, decision: Decision) -> None:
    assert decision.key is not None
    parent, name = config_tree.parent_and_name(cfg, decision.key)
    assert parent is not None
    try:
        config_tree.write(parent, name, decision.after)
    except OmegaConfBaseException as error:
        problem = f"the config refuses that ({str(error).splitlines()[0]})"
        fix = f"Choose a value that it takes ({decision.key}=...), or switch the rewrite off (precision_policy=warn)."
        raise SettingError(decision.key, decision.after, problem, fix) from error
