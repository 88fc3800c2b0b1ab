"""From a composed config to its decision and back: gathers the facts, asks the table, writes what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from precision_policy import candidates, optimizer_node, peft, targets, tree
from precision_policy.decision import BF16_BESIDE, UNCHOSEN, Decision, DtypeField, Facts, Room, decide
from precision_policy.settings import Pair, Path, SettingError, Settings, parse

_NO_KEY = "store the model in fp32 where the code makes it; nothing in the config is known to set its dtype"


def apply(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Decide, write the dtype where that is the decision, and record both in ``cfg.precision_policy``.

    Args:
        cfg: the whole composed config, changed in place.
        overrides: the job's command-line overrides, to spell advice as its reader must type it.

    Raises:
        SettingError: a setting that cannot be right.
    """
    given = _given(cfg.precision_policy)
    settings = parse(given)
    record: dict[str, Any] = {**settings.as_dict(), "decision": None}
    if settings.enabled:
        decisions: dict[str | None, Any] = {}
        saved = given.get("decision") or {}
        for name, pair in settings.each_pair().items():
            kept = saved if name is None else saved.get(name, {})
            if _still_holds(cfg, kept):
                decisions[name] = kept
                continue
            decision = decide(_facts(cfg, settings, pair, overrides))
            if decision.rule == "set":
                _set(cfg, decision)
            decisions[name] = decision.as_dict()
        record["decision"] = decisions.get(None, decisions)
    tree.put(cfg, "precision_policy", record)


def _given(node: DictConfig) -> dict[str, Any]:
    """What was set; ``???`` stands for a setting that was left alone.

    Raises:
        SettingError: an interpolation leads nowhere.
    """
    given = {}
    for key in tree.keys(node):
        if tree.is_missing(node, key):
            continue
        value = tree.value(node, key)
        if value is tree.ABSENT:
            problem, fix = "it cannot be resolved", "Point it at something that the config has."
            raise SettingError(f"precision_policy.{key}", tree.plain(node, key), problem, fix)
        given[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return given


def _still_holds(cfg: DictConfig, decision: Mapping[str, Any]) -> bool:
    """Whether a saved config, run again by hand or by a launcher for each further rank, still has what the policy set."""
    return decision.get("rule") == "set" and tree.at(cfg, decision["key"]) == decision["after"]


def spelled(path: str, overrides: Sequence[str], there: bool) -> str:
    """The left side of the override that sets ``path``: with the + that Hydra asks for where no config file has it."""
    added = any(text.startswith((f"+{path}=", f"++{path}=")) for text in overrides)
    return path if there and not added else f"+{path}"


def _facts(cfg: DictConfig, settings: Settings, pair: Pair, overrides: Sequence[str]) -> Facts:
    keys = settings.keys
    model, no_model = _model(cfg, pair.model, keys)
    optimizer, no_optimizer, torch_optim = _optimizer(cfg, pair.optimizer)
    if pair.peft.chosen and not tree.leads_somewhere(cfg, pair.peft.path):
        raise _leads_nowhere(cfg, pair.peft)
    dtypes = None if model is None else _dtype_fields(model, keys, overrides)
    return Facts(
        no_model=no_model,
        peft=peft.what_is_on(cfg, pair.peft.path),
        optimizer=optimizer,
        no_optimizer=no_optimizer,
        override=_override(model, keys, dtypes),
        torch_optim=torch_optim,
        dtypes=dtypes,
        room=lambda: Room(None) if model is None else _room(model, keys),
        storage_dtype=settings.storage_dtype,
    )


def _model(cfg: DictConfig, at: Path, keys: Sequence[str]) -> tuple[DictConfig | None, str]:
    """The model's node, or None and a clause that says what is there instead."""
    found = tree.at(cfg, at.path)
    if isinstance(found, DictConfig):
        return found, ""
    if at.chosen:
        raise _unusable(cfg, at, found, "holds no mapping", "Name the node that configures the model.")
    return None, _instead(at, found, candidates.models(cfg, keys))


def _optimizer(cfg: DictConfig, at: Path) -> tuple[str | None, str, bool]:
    """What is said of the optimizer at the path, or None and what is said of its absence; whether it is torch's."""
    value = tree.at(cfg, at.path)
    found = optimizer_node.find(value)
    if found is not None and found.torch_optim:
        return found.name, "", True
    if found is not None:
        return f"{found.name} is not from torch.optim and may keep an fp32 master copy of its own", "", False
    if isinstance(value, DictConfig):
        return f"{at.path} does not name its optimizer; the one that the job builds is still watched", "", False
    if at.chosen:
        fix = "Name the optimizer's node, or the key that holds its name."
        raise _unusable(cfg, at, value, "holds neither a mapping nor a name", fix)
    return None, _instead(at, value, candidates.optimizers(cfg)), False


def _unusable(cfg: DictConfig, at: Path, found: Any, what: str, fix: str) -> SettingError:
    if found is tree.ABSENT and not tree.leads_somewhere(cfg, at.path):
        return _leads_nowhere(cfg, at)
    return SettingError(at.setting, at.path, f"{at.path} {what}", fix)


def _leads_nowhere(cfg: DictConfig, at: Path) -> SettingError:
    return SettingError(at.setting, at.path, f"the config has no {at.path}", f"{tree.nearest(cfg, at.path)}.")


def _instead(at: Path, found: Any, candidates: list[str]) -> str:
    what = "there is nothing" if found in (tree.ABSENT, None) else f"there is a {type(found).__name__} and no node"
    if candidates:
        return f"{what} at {at.path}; {' or '.join(f'{at.setting}={path}' for path in candidates)} may be meant"
    return f"{what} at {at.path} ({at.setting} names another path)"


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
    path = tree.key(parent, name)
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


def _override(model: DictConfig | None, keys: Sequence[str], dtypes: Sequence[DtypeField] | None) -> str | None:
    """How the command line spells the model's dtype key, for advice; None where only its target could tell if it takes one."""
    if model is None or dtypes:
        return dtypes[0].override if dtypes else None
    parent, name = _parent(model, keys[-1])
    if parent is None or tree.schema(parent) is not None:
        return None
    takes = not tree.has(parent, "_target_") or targets.is_factory(str(tree.value(parent, "_target_")))
    return f"+{tree.key(parent, name)}" if takes else None


def _room(model: DictConfig, keys: tuple[str, ...]) -> Room:
    parent, name = _parent(model, keys[-1])
    if parent is None:
        return Room(None, f"{tree.full_path(model)} has no mapping to hold {keys[-1]}, so no dtype key was added")
    node, schema = tree.full_path(parent) or "the config's root", tree.schema(parent)
    if schema is not None:
        return Room(None, f"{node} is typed as {schema.__name__}, which has no {' or '.join(keys)}, so none was added")
    if not tree.has(parent, "_target_"):
        return Room(tree.key(parent, name))
    target = targets.dotted(tree.value(parent, "_target_"))
    if target is not None and target.endswith(".zen_processing"):
        target = optimizer_node.target(parent)
    if target is None:
        return Room(None, f"{node}._target_ is not known before the job runs, so no dtype key was added")
    from precision_policy.signature import room_in  # inspect and friends, for the few configs that come this far

    room = room_in(target, tuple(key.rpartition(".")[2] for key in keys))
    return room if room.path is None else Room(tree.key(parent, room.path))


def _set(cfg: DictConfig, decision: Decision) -> None:
    assert decision.key is not None
    parent_path, _, name = decision.key.rpartition(".")
    try:
        tree.write(tree.at(cfg, parent_path or tree.ROOT), name, decision.after)
    except OmegaConfBaseException as error:
        problem = f"its typed field refuses that ({str(error).splitlines()[0]})"
        fix = f"Choose a value that it takes ({decision.key}=...), or switch the rewrite off (precision_policy=warn)."
        raise SettingError(decision.key, decision.after, problem, fix) from error


def asked(cfg: DictConfig) -> tuple[str, str | None]:
    """Of a job whose decision is made: what to do for fp32 storage, and what asked for that already."""
    node, overrides = cfg.precision_policy, list(cfg.hydra.overrides.task)
    settings = parse(_given(node))
    pairs = settings.each_pair()
    decisions = [node.decision[name] for name in pairs] if settings.pairs else [node.decision]
    ways: list[str | None] = []
    for pair, decision in zip(pairs.values(), decisions, strict=True):
        model = tree.at(cfg, pair.model.path)
        if decision.key:
            ways.append(spelled(decision.key, overrides, tree.leads_somewhere(cfg, decision.key)))
        elif isinstance(model, DictConfig):
            ways.append(_override(model, settings.keys, _dtype_fields(model, settings.keys, overrides)))
    fix = " ".join(f"{way}={settings.storage_dtype or 'float32'}" for way in ways if way)
    fp32 = [f"{one.key}={one.after}" for one in decisions if one.key and str(one.after) in BF16_BESIDE]
    return fix or _NO_KEY, ", ".join(fp32) if len(fp32) == len(decisions) else None
