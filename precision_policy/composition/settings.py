"""The settings ``precision_policy.*``: one field of :class:`Settings` tells everything about each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from precision_policy.composition.spelling import BF16_FOR_FP32, is_fp32, yaml_word

NODE = "precision_policy"
"""The config group, the name under which settings are typed, and that of the record in Hydra's own node."""

AUTO = "auto"
_COMPUTE_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "torch.bfloat16": "bfloat16", None: None}
_FP16 = ("float16", "fp16", "half", "torch.float16", "torch.half", 16)
_ROLES = ("model", "optimizer", "peft")


class SettingError(ValueError):
    """A setting that cannot be right; the message names the key, the value and the fix."""

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        super().__init__(f"{key}={yaml_word(value)}: {problem}.\n{fix}")


@dataclass(frozen=True)
class Path:
    """A dotted path into the job's config.

    Attributes:
        setting: the key it was read from.
        path: the path itself; empty where the user said that there is nothing.
        chosen: whether somebody set it; a default that leads nowhere is no error, a chosen one is.
    """

    setting: str
    path: str
    chosen: bool


@dataclass(frozen=True)
class Pair:
    """One model, the optimizer that trains it, and the PEFT flag that governs both."""

    model: Path
    optimizer: Path
    peft: Path


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (value == "." or all(value.split(".")))


def _is_path_or_none(value: Any) -> bool:
    return value is None or _is_path(value)


def _is_pair(value: Any) -> bool:
    if not isinstance(value, Mapping) or "model" not in value or not set(value) <= set(_ROLES):
        return False
    return all(_is_path(path) or (role == "peft" and path is None) for role, path in value.items())


def _is_pairs(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(map(_is_pair, value.values())))


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_monitor(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) <= {"every"} and _is_count(value.get("every", 0), 0)


def _is_fp32(value: Any) -> bool:
    return isinstance(value, (str, int)) and is_fp32(value)


def _is_compute_dtype(value: Any) -> bool:
    return isinstance(value, (str, type(None))) and value in _COMPUTE_DTYPES


def _setting(default: Any, check: Callable[[Any], bool], fix: str, meaning: str, shown: str = "") -> Any:
    """One setting: its default, what it may hold, what to write instead, and what docs/settings.md says of both."""
    about = {"check": check, "fix": fix, "meaning": meaning, "shown": shown or f"`{yaml_word(default)}`"}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """What the user may set. The metadata of a field holds its check, its fix, and the words of docs/settings.md about it.

    ``chosen`` is no setting: it holds the names that were set rather than left to their defaults.
    """

    enabled: bool = _setting(
        True, _is_bool, "Use true or false.", "whether the policy acts at all; the option `off` sets it `false`"
    )
    write: bool = _setting(
        True, _is_bool, "Use true or false.", "whether the dtype is written; the option `warn` sets it `false`"
    )
    model: str = _setting(
        "model",
        _is_path,
        "Use the dotted path of the model's node, such as precision_policy.model=method.model.",
        "dotted path of the model's node; a path you set must exist; `.` is the config's root",
    )
    optimizer: str = _setting(
        "optimizer",
        _is_path,
        "Use the dotted path of its node, such as precision_policy.optimizer=training.optimizer.",
        "dotted path of the optimizer's node, or of its name",
    )
    peft: str | None = _setting(
        AUTO,
        _is_path_or_none,
        "Use the dotted path of the PEFT flag or block, such as precision_policy.peft=model.lora, or null for none.",
        "dotted path of the PEFT flag, rank or block; `auto` looks everywhere; `null`: PEFT is not about this model",
    )
    pairs: Mapping[str, Mapping[str, str | None]] | None = _setting(
        None,
        _is_pairs,
        "Use a mapping of names to {model: PATH, optimizer: PATH, peft: PATH}, the last two optional.",
        "several models: a name to `{model, optimizer, peft}` each",
    )
    dtype_key: str | None = _setting(
        None,
        _is_path_or_none,
        "Use the key's name below the model node, such as model_dtype.",
        "the dtype's key below the model's node, in the project's own words",
        shown="`dtype` or `torch_dtype`",
    )
    storage_dtype: str | int = _setting(
        "float32",
        _is_fp32,
        f"Use {', '.join(BF16_FOR_FP32)}.",
        f"how the project spells fp32: {', '.join(f'`{name}`' for name in BF16_FOR_FP32)}",
    )
    compute_dtype: str | None = _setting(
        None,
        _is_compute_dtype,
        "Use bfloat16, or null to leave it to the application.",
        "`bfloat16`: the forward pass runs under bf16 autocast where the application does not; the option `mixed` sets it",
    )
    master_weights: bool = _setting(
        False,
        _is_bool,
        "Use true or false.",
        "`true`: optimizers keep fp32 master weights of bf16 parameters; the options `master_weights` and `mixed` set it",
    )
    bf16_adam: Literal["warn", "error", "ignore"] = _setting(
        "warn",
        lambda value: value in ("warn", "error", "ignore"),
        "Use warn, error or ignore.",
        "what an optimizer of `torch.optim` that loses updates of bf16 weights leads to: `warn`, `error`, `ignore`",
    )
    sample: int | None = _setting(
        None,
        lambda value: value is None or _is_count(value, 1),
        "Use a number of elements, or null for the default.",
        "how many weights the warning's numbers are read from",
        shown="2^26",
    )
    monitor: Mapping[str, int] = _setting(
        {"every": 0},
        _is_monitor,
        "Use a number of steps, such as precision_policy.monitor.every=100; 0 never logs.",
        "`every`: every so many steps, log the share of weights that the step left unchanged; 0 never",
        shown="`{every: 0}`",
    )
    chosen: frozenset[str] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """The dtype keys to look for, in the order in which one of two is written."""
        return (self.dtype_key,) if self.dtype_key else ("dtype", "torch_dtype")

    def as_dict(self) -> dict[str, Any]:
        """The settings as they stand in the record."""
        return {name: getattr(self, name) for name in NAMES}

    def each_pair(self) -> dict[str | None, Pair]:
        """The pairs to decide, by name; the one pair of a config without ``pairs`` has the name None."""
        default = {role: Path(f"{NODE}.{role}", getattr(self, role) or "", role in self.chosen) for role in _ROLES}
        if not self.pairs:
            return {None: Pair(**default)}
        pairs: dict[str | None, Pair] = {}
        for name, given in self.pairs.items():
            paths = dict(default)
            for role, path in given.items():
                paths[role] = Path(f"{NODE}.pairs.{name}.{role}", path or "", True)
            pairs[name] = Pair(**paths)
        return pairs


TABLE = tuple(setting for setting in fields(Settings) if setting.name != "chosen")
NAMES = tuple(setting.name for setting in TABLE)
DEFAULTS = Settings().as_dict()

# The settings that a decision is made from: a record that is restored keeps its decision unless one of them is typed.
DECIDES = frozenset({"write", "model", "optimizer", "peft", "pairs", "dtype_key", "storage_dtype"})


def parse(given: Mapping[str, Any]) -> Settings:
    """Check what was set, and take the default of everything else.

    Raises:
        SettingError: an unknown key, or a value outside what its key may hold.
    """
    by_name = {setting.name: setting for setting in TABLE}
    meant = {key: _as_meant(key, value) for key, value in given.items()}
    for key, value in meant.items():
        if key not in by_name:
            raise _unknown(key, value)
        about = by_name[key].metadata
        if key == "compute_dtype" and value in _FP16:
            problem = "fp16 compute needs loss scaling, which only the application can do"
            raise SettingError(f"{NODE}.{key}", value, problem, about["fix"])
        if not about["check"](value):
            raise SettingError(f"{NODE}.{key}", value, "not a value that this setting takes", about["fix"])
    settings = Settings(**meant)
    return replace(
        settings,
        compute_dtype=_COMPUTE_DTYPES[settings.compute_dtype],
        monitor={"every": 0, **settings.monitor},
        chosen=frozenset(meant),
    )


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, or None."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def _as_meant(key: str, value: Any) -> Any:
    """A number as people type it: Hydra reads 1e6 as a float."""
    if key == "sample" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _unknown(key: str, value: object) -> SettingError:
    if key == "decision":
        return SettingError(f"{NODE}.{key}", value, "the policy fills this in", "Leave it out.")
    near = nearest_name(key, NAMES)
    hint = f"Did you mean {NODE}.{near}? " if near else ""
    problem = "the precision policy has no such setting"
    return SettingError(f"{NODE}.{key}", value, problem, f"{hint}Its settings are {', '.join(NAMES)}.")
