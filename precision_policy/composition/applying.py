"""From a composed config to its decision and back: gathers the facts, asks the table, writes what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from precision_policy.composition import config_tree, model_node, optimizer_node, peft, suggestions
from precision_policy.composition.decision import ABOUT_THE_MODEL, Decision, Facts, ModelFacts, OptimizerFacts, decide
from precision_policy.composition.settings import AUTO, NODE, Pair, Path, SettingError, Settings, nearest_name, parse

_MISSING_SOMETHING = ("no_model", "no_optimizer", "no_dtype_key", "target_takes_no_dtype")


def apply(cfg: DictConfig, overrides: Sequence[str], compose: Callable[[list[str]], DictConfig] | None = None) -> None:
    """Decide, write the dtype where that is the decision, and record both in ``cfg.precision_policy``.

    Args:
        cfg: the whole composed config, changed in place.
        overrides: the job's command-line overrides, for the spelling of advice.
        compose: composes the job's config with further overrides, so that advice is tried before it is given.

    Raises:
        SettingError: a setting that cannot be right.
    """
    given = _given(cfg[NODE])
    settings = parse(given)
    record: dict[str, Any] = {**settings.as_dict(), "decision": None}
    if settings.enabled:
        decisions: dict[str | None, Any] = {}
        saved = given.get("decision") or {}
        for name, pair in settings.each_pair().items():
            kept = saved if name is None else saved.get(name, {})
            if kept.get("rule") == "set" and config_tree.select(cfg, kept["key"]) == kept["after"]:
                decisions[name] = kept  # a saved config that is run again still has what the policy set
                continue
            decision = _with_advice(cfg, settings, pair, overrides, compose)
            if decision.rule == "set":
                _set(cfg, decision)
            decisions[name] = decision.as_dict()
        record["decision"] = decisions.get(None, decisions)
    config_tree.record(cfg, NODE, record)


def decide_pair(cfg: DictConfig, settings: Settings, pair: Pair, overrides: Sequence[str], advice: str = "") -> Decision:
    """The decision about one model and its optimizer. Nothing is written.

    Raises:
        SettingError: a setting that cannot be right.
    """
    facts = _facts(cfg, settings, pair, overrides)
    decision = decide(replace(facts, advice=advice))
    if decision.rule == "target_takes_no_dtype" and isinstance(facts.model, ModelFacts):
        # Only now is the model's target imported, which may take seconds: every other rule does without.
        model = _model(cfg, settings, pair.model, overrides, inspect_target=True)
        decision = decide(replace(facts, model=model, advice=advice))
    return decision


def _with_advice(
    cfg: DictConfig, settings: Settings, pair: Pair, overrides: Sequence[str], compose: Callable[[list[str]], DictConfig] | None
) -> Decision:
    """The decision; where something is missing, its reason ends in what to do about it."""
    decision = decide_pair(cfg, settings, pair, overrides)
    elsewhere = suggestions.other_keys(cfg, decision, overrides) if decision.rule == "set" or not decision.fix else ""
    if decision.rule not in _MISSING_SOMETHING:
        return replace(decision, elsewhere=elsewhere)
    line = None
    if not settings.pairs:
        line = suggestions.line(cfg, settings, lambda other: decide_pair(cfg, other, other.each_pair()[None], overrides))
    if line is not None and compose is not None and not _leads_to_the_model(compose, line):
        line = None
    if line is not None:
        advice = f"; to decide about it, add: {line}"
    elif elsewhere:
        advice = f"; what may choose the dtype here: {elsewhere}"
    else:
        advice = ""
    told = decide_pair(cfg, settings, pair, overrides, advice)
    return replace(told, fix=line or told.fix, elsewhere=elsewhere)


def _leads_to_the_model(compose: Callable[[list[str]], DictConfig], line: str) -> bool:
    try:
        tried = compose(line.split())
        settings = parse(_given(tried[NODE]))
        decision = decide_pair(tried, settings, settings.each_pair()[None], [])
    except Exception:  # whatever it is, the line is not one to show
        return False
    return decision.rule in ABOUT_THE_MODEL


def _given(node: DictConfig) -> dict[str, Any]:
    """What was set; ``???`` stands for a setting that was left alone.

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


def _facts(cfg: DictConfig, settings: Settings, pair: Pair, overrides: Sequence[str]) -> Facts:
    looked_for = pair.peft.path == AUTO
    if pair.peft.chosen and not looked_for and pair.peft.path and not config_tree.exists(cfg, pair.peft.path):
        raise _leads_nowhere(cfg, pair.peft)
    if looked_for:
        others = [one.peft.path for one in settings.each_pair().values() if one.peft.path]
        is_on = peft.on_anywhere(cfg, but=others)
    elif pair.peft.path:
        is_on = peft.on_at(cfg, pair.peft.path)
    else:
        is_on = None
    return Facts(
        model=_model(cfg, settings, pair.model, overrides, inspect_target=False),
        optimizer=_optimizer(cfg, pair.optimizer),
        peft=is_on,
        peft_setting=pair.peft.setting if looked_for else "",
        fp32=settings.storage_dtype,
        write=settings.write,
        compute_dtype=settings.compute_dtype,
    )


def _model(cfg: DictConfig, settings: Settings, at: Path, overrides: Sequence[str], inspect_target: bool) -> ModelFacts | str:
    """The facts about the model's node, or a clause that says what is there instead."""
    found = config_tree.select(cfg, at.path)
    if isinstance(found, DictConfig):
        return model_node.describe(found, settings.keys, settings.dtype_key is not None, overrides, inspect_target)
    if at.chosen:
        raise _unusable(cfg, at, found, "holds no mapping", "Name the node that configures the model.")
    return _instead(at, found)


def _optimizer(cfg: DictConfig, at: Path) -> OptimizerFacts | str:
    """The optimizer at the path, or a clause that says what is there instead."""
    value = config_tree.select(cfg, at.path)
    found = optimizer_node.find(value)
    if found is not None:
        not_torch = f"{found.name} is not from torch.optim and may keep an fp32 master copy of its own"
        return found if found.torch_optim else replace(found, name=not_torch)
    if isinstance(value, DictConfig):
        clause = f"{at.path} does not name its optimizer; the one that the job builds is still watched"
        return OptimizerFacts(clause, torch_optim=False)
    if at.chosen:
        fix = "Name the optimizer's node, or the key that holds its name."
        raise _unusable(cfg, at, value, "holds neither a mapping nor a name", fix)
    return _instead(at, value)


def _unusable(cfg: DictConfig, at: Path, found: Any, what: str, fix: str) -> SettingError:
    if found is config_tree.ABSENT and not config_tree.exists(cfg, at.path):
        return _leads_nowhere(cfg, at)
    return SettingError(at.setting, at.path, f"{at.path} {what}", fix)


def _leads_nowhere(cfg: DictConfig, at: Path) -> SettingError:
    """The error for a path that does not exist: the path that was probably meant, and what is there."""
    near = nearest_name(at.path, suggestions.all_paths(cfg))
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


def _instead(at: Path, found: Any) -> str:
    if found is config_tree.ABSENT or found is None:
        return f"there is nothing at {at.path}"
    return f"{at.path} is a plain value ({type(found).__name__}) and no node"


def _set(cfg: DictConfig, decision: Decision) -> None:
    assert decision.key is not None
    parent, name = config_tree.parent_and_name(cfg, decision.key)
    assert parent is not None
    try:
        config_tree.write(parent, name, decision.after)
    except OmegaConfBaseException as error:
        problem = f"its typed field refuses that ({str(error).splitlines()[0]})"
        fix = f"Choose a value that it takes ({decision.key}=...), or switch the rewrite off (precision_policy=warn)."
        raise SettingError(decision.key, decision.after, problem, fix) from error
