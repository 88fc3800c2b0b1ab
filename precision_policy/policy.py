"""From a composed config to its decision and back: gathers the facts, asks the table, writes what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from precision_policy import optimizer_node, peft, targets, tree
from precision_policy.decision import BF16_BESIDE, UNCHOSEN, Decision, DtypeField, Facts, Room, decide
from precision_policy.settings import Pair, Path, SettingError, Settings, parse

_DTYPE_KEYS = ("dtype", "torch_dtype")  # in the order in which one of two is written


def apply(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Decide, write the dtype where that is the decision, and record both in ``cfg.precision_policy``.

    Args:
        cfg: the whole composed config, changed in place.
        overrides: the job's command-line overrides, to spell advice as its reader must type it.

    Raises:
        SettingError: a setting that cannot be right.
    """
    settings = parse(_given(cfg.precision_policy))
    record: dict[str, Any] = {**settings.as_dict(), "decision": None}
    if settings.enabled:
        decisions: dict[str | None, Any] = {}
        for name, pair in settings.each_pair().items():
            decision = decide(_facts(cfg, settings, pair, overrides))
            if decision.rule == "set":
                _set(cfg, decision)
            decisions[name] = decision.as_dict()
        record["decision"] = decisions.get(None, decisions)
    tree.put(cfg, "precision_policy", record)


def _given(node: DictConfig) -> dict[str, Any]:
    """What was set; ``???`` stands for a setting that was left alone."""
    given = {key: node[key] for key in tree.keys(node) if not tree.is_missing(node, key)}
    return {key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in given.items()}


def spelled(path: str, overrides: Sequence[str], there: bool) -> str:
    """The left side of the override that sets ``path``: with the + that Hydra asks for where no config file has it."""
    added = any(text.startswith((f"+{path}=", f"++{path}=")) for text in overrides)
    return path if there and not added else f"+{path}"


def _facts(cfg: DictConfig, settings: Settings, pair: Pair, overrides: Sequence[str]) -> Facts:
    model, no_model = _model(cfg, pair.model)
    optimizer, no_optimizer = _optimizer(cfg, pair.optimizer)
    if pair.peft.chosen and not tree.leads_somewhere(cfg, pair.peft.path):
        raise _leads_nowhere(cfg, pair.peft)
    keys = (settings.dtype_key,) if settings.dtype_key else _DTYPE_KEYS
    return Facts(
        no_model=no_model,
        peft=peft.what_is_on(cfg, pair.peft.path),
        optimizer=None if optimizer is None else optimizer.name,
        no_optimizer=no_optimizer,
        torch_optim=optimizer is not None and optimizer.torch_optim,
        dtypes=None if model is None else _dtype_fields(model, keys, overrides),
        room=lambda: Room(None) if model is None else _room(model, keys),
        storage_dtype=settings.storage_dtype,
    )


def _model(cfg: DictConfig, at: Path) -> tuple[DictConfig | None, str]:
    """The model's node, or None and a clause that says what is there instead."""
    found = tree.at(cfg, at.path)
    if isinstance(found, DictConfig):
        return found, ""
    if at.chosen:
        raise _unusable(cfg, at, found, "holds no mapping", "Name the node that configures the model.")
    return None, _instead(cfg, at, found, _model_candidates(cfg))


def _optimizer(cfg: DictConfig, at: Path) -> tuple[optimizer_node.Found | None, str]:
    """The optimizer at the path, or None and a clause that says what is there instead."""
    value = tree.at(cfg, at.path)
    found = optimizer_node.find(value)
    if found is None and isinstance(value, DictConfig):
        found = optimizer_node.Found(f"{at.path}, which names no optimizer,", False)
    if found is not None:
        return found, ""
    if at.chosen:
        fix = "Name the optimizer's node, or the key that holds its name."
        raise _unusable(cfg, at, value, "holds neither a mapping nor a name", fix)
    return None, _instead(cfg, at, value, _optimizer_candidates(cfg))


def _unusable(cfg: DictConfig, at: Path, found: Any, what: str, fix: str) -> SettingError:
    if found is tree.ABSENT and not tree.leads_somewhere(cfg, at.path):
        return _leads_nowhere(cfg, at)
    return SettingError(at.setting, at.path, f"{at.path} {what}", fix)


def _leads_nowhere(cfg: DictConfig, at: Path) -> SettingError:
    return SettingError(at.setting, at.path, f"the config has no {at.path}", f"{tree.nearest(cfg, at.path)}.")


def _instead(cfg: DictConfig, at: Path, found: Any, candidates: list[str]) -> str:
    what = "there is nothing" if found in (tree.ABSENT, None) else f"there is a {type(found).__name__} and no node"
    if candidates:
        return f"{what} at {at.path}; {' or '.join(f'{at.setting}={path}' for path in candidates)} may be meant"
    return f"{what} at {at.path} ({at.setting} names another path)"


def _optimizer_candidates(cfg: DictConfig) -> list[str]:
    return [path for path, node in tree.walk(cfg) if targets.is_torch_optim(tree.plain(node, "_target_"))][:3]


def _model_candidates(cfg: DictConfig) -> list[str]:
    return [
        path
        for path, node in tree.walk(cfg)
        if path
        and not path.startswith(("hydra", "precision_policy"))
        and ("torch_dtype" in node or str(tree.plain(node, "_target_")).endswith((".from_pretrained", ".from_config")))
    ][:3]


def _dtype_fields(model: DictConfig, keys: Sequence[str], overrides: Sequence[str]) -> tuple[DtypeField, ...]:
    return tuple(
        _dtype_field(parent, name, overrides)
        for parent, name in (_parent(model, key) for key in keys)
        if parent is not None and tree.has(parent, name)
    )


def _parent(model: DictConfig, key: str) -> tuple[DictConfig | None, str]:
    """The mapping that holds a key, which may be nested as in ``model_args.torch_dtype``, and the key's last part."""
    above, _, name = key.rpartition(".")
    parent = tree.at(model, above) if above else model
    return (parent if isinstance(parent, DictConfig) else None), name


def _dtype_field(parent: DictConfig, name: str, overrides: Sequence[str]) -> DtypeField:
    path = f"{tree.full_path(parent)}.{name}"
    override = spelled(path, overrides, there=True)
    if tree.is_missing(parent, name):
        return DtypeField(path, override, None, chosen=True, note=f"{path} is ???, which Hydra will ask for, and")
    value, pointed_at = tree.value(parent, name), tree.pointer(parent, name)
    if value is tree.ABSENT:
        note = f"{path} points at {pointed_at}, which is not known before the job runs, and"
        return DtypeField(path, override, None, chosen=True, note=note)
    if value is None or isinstance(value, (str, bool, int, float)):
        return DtypeField(path, override, value, chosen=value not in UNCHOSEN, pointed_at=pointed_at)
    text = "a node" if OmegaConf.is_config(value) else str(value)
    return DtypeField(path, override, text, chosen=True)


def _room(model: DictConfig, keys: tuple[str, ...]) -> Room:
    parent, name = _parent(model, keys[-1])
    if parent is None:
        return Room(None, f"{tree.full_path(model)} has no mapping to hold {keys[-1]}, so no dtype key was added")
    node, schema = tree.full_path(parent), tree.schema(parent)
    if schema is not None:
        return Room(None, f"{node} is typed as {schema.__name__}, which has no {' or '.join(keys)}, so none was added")
    if not tree.has(parent, "_target_"):
        return Room(f"{node}.{name}")
    target = optimizer_node.target(parent) if str(parent._target_).endswith("zen_processing") else None
    target = target or targets.dotted(tree.value(parent, "_target_"))
    if target is None:
        return Room(None, f"{node}._target_ is not known before the job runs, so no dtype key was added")
    from precision_policy.signature import room_in  # inspect and friends, for the few configs that come this far

    return room_in(target, node, keys)


def _set(cfg: DictConfig, decision: Decision) -> None:
    assert decision.key is not None
    parent_path, _, name = decision.key.rpartition(".")
    try:
        tree.write(tree.at(cfg, parent_path), name, decision.after)
    except OmegaConfBaseException as error:
        problem = f"its typed field refuses that ({str(error).splitlines()[0]})"
        fix = f"Choose a value that it takes ({decision.key}=...), or switch the rewrite off (precision_policy=warn)."
        raise SettingError(decision.key, decision.after, problem, fix) from error


def asked(cfg: DictConfig) -> tuple[str, str | None]:
    """Of a job whose decision is made: the override that gives its model fp32 storage, and what asked for that already."""
    node, overrides = cfg.precision_policy, list(cfg.hydra.overrides.task)
    decisions = [node.decision[name] for name in node.decision] if node.pairs else [node.decision]
    keys = [one.key for one in decisions if one.key] or [f"{node.model}.{node.dtype_key or 'torch_dtype'}"]
    fix = " ".join(
        f"{spelled(key, overrides, tree.leads_somewhere(cfg, key))}={node.storage_dtype or 'float32'}" for key in keys
    )
    fp32 = [f"{one.key}={one.after}" for one in decisions if one.key and str(one.after) in BF16_BESIDE]
    return fix, ", ".join(fp32) if len(fp32) == len(decisions) else None
