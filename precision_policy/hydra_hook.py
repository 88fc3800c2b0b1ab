"""The one module that touches Hydra's internals: it makes the decision part of composing a config, and opens both rooms.

Why here and nowhere else: by the time a callback sees a job, Hydra has already copied the config for the task and written
``.hydra/config.yaml``. The Compose API and ``--cfg`` call no callback at all. Composition is the only step that a plain
run, every job of a sweep in whatever process, ``hydra.compose`` and ``--cfg`` share, and Hydra has no public hook there.

The job's own config stays the application's. The option's file and the settings on the command line are taken out of what
Hydra merges into it, and what comes of them is put into Hydra's own node, at ``hydra.precision_policy``.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

PROVIDER = "precision-policy"
"""The name under which the options stand on Hydra's search path."""

_NODE = "precision_policy"
_OPTIONS = ("on", "mixed", "master_weights", "warn", "strict")
_MARK = "_precision_policy_wrap"
# An override that sets the group as a plain value: YAML and Hydra read an unquoted on as true. Compiled where it is needed,
# since every Hydra application on the machine imports this.
_PLAIN_VALUE = rf"(?i)\+{{0,2}}{_NODE}=(null|true|false|on|off|yes|no|\d+|\{{.*|\[.*)"
_WHAT_TO_WRITE = (
    f'Write +{_NODE}=on on the command line, or - {_NODE}: "on", quoted, in a defaults list. YAML reads a bare on as true.'
)


@dataclass
class _Composition:
    """What is known of the policy while one config is composed.

    Attributes:
        config_name: the name of the primary config.
        is_sweep: whether it is a sweep's own config, which is nobody's job: its jobs are composed one by one.
        option: what the option that is chosen sets, or None where none is.
        saved: the record of a saved config that runs again, or None.
        typed: the overrides of the command line that are settings of the policy.
    """

    config_name: str | None
    is_sweep: bool
    option: dict[str, Any] | None = None
    saved: dict[str, Any] | None = None
    typed: list[Any] = field(default_factory=list)

    @property
    def is_on(self) -> bool:
        """Whether there is an option for which settings can be typed."""
        return self.is_sweep or self.option is not None or self.saved is not None


_current: ContextVar[_Composition | None] = ContextVar("composition", default=None)


def install() -> bool:
    """Wrap what must be wrapped, once however often it is called: Hydra 1.3 may execute the plugin's module again.

    Returns:
        Whether this Hydra has all of it. Where it has not, nothing is wrapped.
    """
    try:
        from hydra._internal.callbacks import Callbacks
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra._internal.config_repository import ConfigRepository
    except ImportError:
        return False
    wraps: list[tuple[type, str, Callable[..., Any]]] = [
        (ConfigLoaderImpl, "_load_configuration_impl", _compose),
        (ConfigLoaderImpl, "_compose_config_from_defaults_list", _merge),
        (ConfigLoaderImpl, "_apply_overrides_to_config", _override),
        (ConfigRepository, "_create_defaults_list", _read_defaults),
        (Callbacks, "on_job_start", _job_start),
    ]
    if not all(hasattr(kind, name) for kind, name, _ in wraps) or not hasattr(ConfigLoaderImpl, "_load_single_config"):
        return False
    for kind, name, around in wraps:
        _wrap(kind, name, around)
    return True


def _wrap(kind: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(kind, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    is_static = isinstance(kind.__dict__.get(name), staticmethod)
    setattr(kind, name, staticmethod(wrapper) if is_static else wrapper)


def _compose(
    original: Callable[..., DictConfig],
    self: Any,
    config_name: str | None,
    overrides: list[str],
    run_mode: RunMode,
    *args: Any,
    **kwargs: Any,
) -> DictConfig:
    """Compose as Hydra does, then let the policy decide."""
    composition = _Composition(config_name, is_sweep=run_mode is RunMode.MULTIRUN)
    outer = _current.set(composition)
    try:
        cfg = original(self, config_name, overrides, run_mode, *args, **kwargs)
    except ValueError as error:
        plain = next((text for text in overrides if re.fullmatch(_PLAIN_VALUE, text)), None)
        if plain is None:
            raise
        raise ConfigCompositionException(
            f"{plain}: the policy is an option of a config group, and this is no name of one.\n"
            f"{_WHAT_TO_WRITE} To switch it off: {_NODE}=off."
        ) from error
    finally:
        _current.reset(outer)
    if composition.is_sweep:
        return cfg
    if composition.is_on:
        _decide(cfg, composition)
    else:
        _refuse_what_does_nothing(cfg)
    return cfg


def _merge(original: Callable[..., DictConfig], self: Any, defaults: Sequence[Any], repo: Any) -> DictConfig:
    """Merge the defaults list as Hydra does, but for the policy's options, which are no part of the application's config."""
    composition = _current.get()
    if composition is None:
        return original(self, defaults=defaults, repo=repo)
    ours = [default for default in defaults if _is_option(default, repo)]
    if not ours:
        if not composition.is_sweep:
            composition.saved = _saved_record(self, composition.config_name)
        return original(self, defaults=defaults, repo=repo)
    for default in ours:
        if default.package:
            raise ConfigCompositionException(
                f"{_NODE}@{default.package}: the policy decides about the whole config, and below {default.package} its option "
                f"{default.config_path.rpartition('/')[2]} would do nothing.\n"
                f'Write +{_NODE}=on on the command line, or - /{_NODE}: "on", without @, in a defaults list.'
            )
    cfg = original(self, defaults=[default for default in defaults if default not in ours], repo=repo)
    composition.option = _settings_of(ours, self, defaults if _has_node(cfg) else ours, repo)
    return cfg


def _is_option(default: Any, repo: Any) -> bool:
    """Whether an entry of the defaults list is one of our files. An application may have a group of the same name."""
    path = str(default.config_path)
    return path.startswith(f"{_NODE}/") and repo.load_config(path).provider == PROVIDER


def _settings_of(ours: Sequence[Any], loader: Any, defaults: Sequence[Any], repo: Any) -> dict[str, Any]:
    """What the chosen options set, but for what a later file of the application sets in a block of its own."""
    from precision_policy.composition import config_tree  # not at the top: applications without the policy never need it

    settings: dict[str, Any] = {}
    for default in defaults:
        loaded = loader._load_single_config(default=default, repo=repo).config
        block = dict(config_tree.children(loaded)).get(_NODE)
        if default in ours:
            settings.update(OmegaConf.to_container(block))  # type: ignore[arg-type]  # of a mapping, it is one
        elif block is not None:
            for key, _ in config_tree.children(block):
                settings.pop(key, None)
    settings.pop("decision")
    return settings


def _override(original: Callable[..., None], overrides: Sequence[Any], cfg: DictConfig) -> None:
    """Apply the command line as Hydra does, but for the policy's settings, which are kept for the decision."""
    composition = _current.get()
    if composition is None:
        original(overrides, cfg)
        return
    theirs = []
    for override in overrides:
        key = override.key_or_group
        if re.match(rf"hydra\.{_NODE}(\W|$)", key):
            raise ConfigCompositionException(
                f"{override.input_line}: this is where the policy records its settings and its decision.\n"
                f"Write {_NODE}{key.removeprefix(f'hydra.{_NODE}')}=..., beside +{_NODE}=on."
            )
        if not re.match(rf"{_NODE}(\W|$)", key):
            theirs.append(override)
            continue
        is_the_applications = _is_in_block(cfg, override, composition)
        if not composition.is_on and not is_the_applications:
            option = "master_weights" if key == f"{_NODE}.master_weights" else "on"
            raise ConfigCompositionException(
                f"{override.input_line}: no option of the policy is chosen, so this setting does nothing.\n"
                f"Add +{_NODE}={option}."
            )
        if is_the_applications:
            theirs.append(override)
        if not is_the_applications or composition.saved is not None:
            composition.typed.append(override)
        elif composition.option is not None:
            composition.option.pop(_setting(override), None)  # the command line comes after the option
    original(theirs, cfg)


def _is_in_block(cfg: DictConfig, override: Any, composition: _Composition) -> bool:
    """Whether an override is about a block that the application has of its own, so that Hydra applies it there."""
    if not _has_node(cfg):
        return False
    from precision_policy.composition import config_tree
    from precision_policy.composition.settings import NAMES

    if config_tree.exists(cfg, override.key_or_group):
        return True
    if composition.is_on:
        return bool(override.is_add() or override.is_force_add())
    return _setting(override) not in NAMES


def _setting(override: Any) -> str:
    """The name of the setting that an override is about."""
    return str(override.key_or_group).partition(".")[2].partition(".")[0]


def _decide(cfg: DictConfig, composition: _Composition) -> None:
    """Let the policy decide, and record that in Hydra's own node."""
    from precision_policy.composition import config_tree
    from precision_policy.composition.applying import apply
    from precision_policy.composition.settings import SettingError

    decision = None
    if composition.saved is not None and composition.option is None:
        decision = composition.saved["decision"]
    try:
        given = _given(cfg, composition)
        if _decides_anew(composition):
            decision = None
        record = apply(cfg, given, list(cfg.hydra.overrides.task), decision)
    except SettingError as error:
        raise ConfigCompositionException(str(error)) from None
    config_tree.record(cfg.hydra, _NODE, record)


def _given(cfg: DictConfig, composition: _Composition) -> dict[str, Any]:
    """The settings that somebody set: the application's own block, then the option, then the command line."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    from precision_policy.composition import config_tree
    from precision_policy.composition.applying import read_settings
    from precision_policy.composition.settings import DEFAULTS

    settings: dict[str, Any] = {}
    if composition.option is not None:
        block = config_tree.select(cfg, _NODE) if _has_node(cfg) else None
        if isinstance(block, DictConfig):
            settings.update(read_settings(block))
        settings.update(composition.option)
    elif composition.saved is not None:
        for key, value in composition.saved.items():
            if key != "decision" and value != DEFAULTS.get(key):
                settings[key] = value
    if not composition.typed:
        return settings
    typed = OmegaConf.create({_NODE: settings})
    ConfigLoaderImpl._apply_overrides_to_config(composition.typed, typed)
    node = typed[_NODE]
    node._set_parent(cfg)  # so that an interpolation leads where it would lead in the job's config
    return read_settings(node)


def _decides_anew(composition: _Composition) -> bool:
    """Whether a setting is typed from which a saved decision was made."""
    from precision_policy.composition.settings import DECIDES

    return any(_setting(override) in DECIDES for override in composition.typed)


def _refuse_what_does_nothing(cfg: DictConfig) -> None:
    """Refuse what looks as if it switched the policy on and does not."""
    if not _has_node(cfg):
        return
    node = cfg._get_node(_NODE)
    value = node._value() if node is not None else None
    if value is True or value in _OPTIONS:
        raise ConfigCompositionException(
            f"{_NODE}={value}: the policy is an option of a config group, and as a plain key it does nothing.\n{_WHAT_TO_WRITE}"
        )
    if isinstance(node, DictConfig) and isinstance(value, dict) and "decision" in value:
        raise ConfigCompositionException(
            f"{_NODE}.decision: versions before 0.3 recorded their decision here, and the record is not read any more.\n"
            f"Take {_NODE} out of this config, and add +{_NODE}=on."
        )


def _saved_record(loader: Any, config_name: str | None) -> dict[str, Any] | None:
    """The record of a saved config that runs again, from the ``hydra.yaml`` that Hydra wrote beside it; else None."""
    if config_name not in ("config", "config.yaml"):
        return None
    for source in loader.get_sources():
        if source.provider == "main" and source.scheme() == "file":
            path = os.path.join(source.path, "hydra.yaml")
            if not os.path.isfile(path):
                return None
            try:
                record: Any = OmegaConf.to_container(OmegaConf.load(path).hydra[_NODE])
                return record if "decision" in record else None
            except Exception:  # a file of that name may be anything: it is the application's
                return None
    return None


def _read_defaults(original: Callable[..., Any], self: Any, config_path: str, defaults: ListConfig) -> Any:
    """Read a defaults list as Hydra does; where it fails on our group, say what to write."""
    try:
        return original(self, config_path, defaults)
    except ValueError as error:
        for item in defaults:
            if isinstance(item, DictConfig):
                for key, value in item.items():
                    if _NODE in re.split(r"[\s/@]", f"{key!s}") and isinstance(value, (bool, int, float)):
                        raise ConfigCompositionException(
                            f"In {config_path}: - {key!s}: {str(value).lower()} is no option of the policy.\n{_WHAT_TO_WRITE}"
                        ) from error
        raise


def _job_start(original: Callable[..., None], self: Any, config: DictConfig, *args: Any, **kwargs: Any) -> None:
    """Give the job the policy's callback. Named in the config, it would need a whitelist entry in Hydra 1.4.

    Raises:
        SystemExit: an option is chosen, and nothing was decided when the config was composed.
    """
    record = OmegaConf.select(config, f"hydra.{_NODE}")
    if record is None:
        _stop_where_undecided(config)
    elif record.enabled:
        from precision_policy.job.callback import JobCallback

        if not any(isinstance(callback, JobCallback) for callback in self.callbacks):
            self.callbacks.append(JobCallback())
    original(self, config, *args, **kwargs)


def _stop_where_undecided(config: DictConfig) -> None:
    """Stop a job in whose config an option's file has arrived as it is, because Hydra did not come by the hook."""
    node = config.get(_NODE) if _has_node(config) else None
    if isinstance(node, DictConfig) and "decision" in node and node.get("enabled", True):
        raise SystemExit(
            "precision_policy is on, but nothing was decided when the config was composed: this version of "
            "hydra-precision-policy does not know this version of Hydra.\n"
            "Install a version that does, or switch the policy off (precision_policy=off)."
        )


def _has_node(cfg: DictConfig) -> bool:
    """Whether the application's config has a key of our name. ``in`` would resolve what stands there."""
    return _NODE in cfg.keys()  # noqa: SIM118
