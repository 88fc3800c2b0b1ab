"""The settings in the config node ``precision_policy``: names, defaults, and what each may hold."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from precision_policy.decision import BF16_BESIDE


class SettingError(ValueError):
    """A setting that cannot be right; the message names the key, the value and the fix."""

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        super().__init__(f"{key}={value}: {problem}.\n{fix}")


@dataclass(frozen=True)
class Path:
    """A dotted path into the job's config.

    Attributes:
        setting: the key it was read from.
        path: the path itself.
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


@dataclass(frozen=True)
class Settings:
    """What the user may set, with its defaults.

    Attributes:
        enabled: whether the policy acts at all (``precision_policy=off`` sets it false).
        model: dotted path of the node whose dtype key is decided.
        optimizer: dotted path of the optimizer's node, or of its name.
        peft: dotted path of the PEFT flag, rank or block.
        pairs: for several models: a name to ``{model, optimizer, peft}`` each, decided one by one; what a pair leaves
            out is taken from the three above.
        dtype_key: the project's own name of the dtype key below the model node; None for ``dtype``/``torch_dtype``.
        storage_dtype: what is written, in the project's spelling of fp32; None never writes.
        bf16_adam: what a torch Adam over trainable bf16 parameters leads to.
        sample: how many elements the warning's numbers are read from; None for 2**26 on a CPU and all on a GPU.
        monitor: ``every``: log the share of weights left unchanged every so many steps; 0 never.
        chosen: the names above that were set rather than left to their defaults.
    """

    enabled: bool = True
    model: str = "model"
    optimizer: str = "optimizer"
    peft: str = "peft"
    pairs: Mapping[str, Mapping[str, str]] | None = None
    dtype_key: str | None = None
    storage_dtype: str | None = "float32"
    bf16_adam: Literal["warn", "error", "ignore"] = "warn"
    sample: int | None = None
    monitor: Mapping[str, int] = field(default_factory=lambda: {"every": 0})
    chosen: frozenset[str] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """The dtype keys to look for, in the order in which one of two is written."""
        return (self.dtype_key,) if self.dtype_key else ("dtype", "torch_dtype")

    def as_dict(self) -> dict[str, Any]:
        """The settings as they stand in the job's config."""
        return {name: getattr(self, name) for name in NAMES}

    def each_pair(self) -> dict[str | None, Pair]:
        """The pairs to decide, by name; the one pair of a config without ``pairs`` has the name None."""
        default = {name: Path(f"precision_policy.{name}", getattr(self, name), name in self.chosen) for name in _ROLES}
        if not self.pairs:
            return {None: Pair(**default)}
        return {
            name: Pair(
                **{
                    role: Path(f"precision_policy.pairs.{name}.{role}", pair[role], True) if role in pair else path
                    for role, path in default.items()
                }
            )
            for name, pair in self.pairs.items()
        }


NAMES = tuple(one.name for one in fields(Settings) if one.name != "chosen")
_ROLES = ("model", "optimizer", "peft")


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (value == "." or all(value.split(".")))


def _is_pairs(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and all(
            isinstance(pair, Mapping) and "model" in pair and set(pair) <= set(_ROLES) and all(map(_is_path, pair.values()))
            for pair in value.values()
        )
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_monitor(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) <= {"every"} and _is_count(value.get("every", 0), 0)


def _among(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (str, type(None))) and value in choices


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "enabled": (lambda v: isinstance(v, bool), "Use true or false."),
    "model": (_is_path, "Use the dotted path of the model's node, such as precision_policy.model=method.model."),
    "optimizer": (_is_path, "Use the dotted path of its node, such as precision_policy.optimizer=training.optimizer."),
    "peft": (_is_path, "Use the dotted path of the PEFT flag or block, such as precision_policy.peft=model.lora."),
    "pairs": (
        _is_pairs,
        "Use a mapping of names to {model: PATH, optimizer: PATH, peft: PATH}, the last two optional.",
    ),
    "dtype_key": (lambda v: v is None or _is_path(v), "Use the key's name below the model node, such as model_dtype."),
    "storage_dtype": (_among(None, *BF16_BESIDE), f"Use {', '.join(BF16_BESIDE)}, or null to never set it."),
    "bf16_adam": (_among("warn", "error", "ignore"), "Use warn, error or ignore."),
    "sample": (lambda v: v is None or _is_count(v, 1), "Use a number of elements, or null for the default."),
    "monitor": (_is_monitor, "Use a number of steps, such as precision_policy.monitor.every=100; 0 never logs."),
}


def parse(raw: Mapping[str, Any]) -> Settings:
    """Check what stands in the config node; an absent key, as ``???`` leaves it, takes its default.

    Raises:
        SettingError: an unknown key, or a value outside what its key may hold.
    """
    if not isinstance(raw.get("decision"), (Mapping, type(None))):
        raise SettingError("precision_policy.decision", raw["decision"], "the policy fills this in", "Leave it out.")
    given = {key: value for key, value in raw.items() if key != "decision"}
    for key, value in given.items():
        if key not in _CHECKS:
            raise unknown(key, value)
        fits, fix = _CHECKS[key]
        if not fits(value):
            raise SettingError(f"precision_policy.{key}", value, "not a value that this setting takes", fix)
    settings = Settings(**given)
    # A job's saved config that is run again has every setting in it, whoever set it.
    saved = raw.get("decision") is not None
    chosen = frozenset(key for key, value in given.items() if not saved or value != getattr(Settings, key, None))
    return replace(settings, monitor={"every": 0, **settings.monitor}, chosen=chosen)


def unknown(key: str, value: object, names: Iterable[str] = NAMES) -> SettingError:
    """The error for a setting that does not exist, with the one that was probably meant."""
    names = list(names)
    guess = difflib.get_close_matches(key, names, n=1)
    hint = f"Did you mean precision_policy.{guess[0]}? " if guess else ""
    problem = "the precision policy has no such setting"
    return SettingError(f"precision_policy.{key}", value, problem, f"{hint}Its settings are {', '.join(names)}.")
