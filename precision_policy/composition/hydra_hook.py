"""The one module that touches Hydra's internals: it makes the decision part of composing a config.

Why here and nowhere else: by the time a callback sees a job, Hydra has already copied the config for the task and written
``.hydra/config.yaml``. The Compose API and ``--cfg`` call no callback at all. Composition is the only step that a plain
run, every job of a sweep in whatever process, ``hydra.compose`` and ``--cfg`` share, and Hydra has no public hook there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override

_NODE = "precision_policy"
_OPTIONS = ("on", "mixed", "warn", "strict")
_MARK = "_precision_policy_wrap"
# An override that sets the group as a plain value: YAML and Hydra read an unquoted on as true. Compiled where it is needed,
# since every Hydra application on the machine imports this.
_PLAIN_VALUE = rf"(?i)\+{{0,2}}{_NODE}=(true|false|on|off|yes|no|\d+|\{{.*|\[.*)"
_WHAT_TO_WRITE = (
    f'Write +{_NODE}=on on the command line, or - {_NODE}: "on", quoted, in a defaults list. YAML reads a bare on as true.'
)
# Whether the composition in progress is a sweep's own, with settings for an option that its jobs will choose.
_opens_for_sweep: ContextVar[bool] = ContextVar("opens_for_sweep", default=False)
# Whether the composition in progress only tries a line of advice.
_is_tried: ContextVar[bool] = ContextVar("is_tried", default=False)


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
        (ConfigLoaderImpl, "_load_configuration_impl", _load),
        (ConfigLoaderImpl, "_compose_config_from_defaults_list", _merge),
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
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    setattr(kind, name, wrapper)


def _load(
    original: Callable[..., DictConfig],
    self: Any,
    config_name: str | None,
    overrides: list[str],
    run_mode: RunMode,
    *args: Any,
    **kwargs: Any,
) -> DictConfig:
    """Compose as Hydra does, then let the policy decide."""
    sweeps = run_mode is RunMode.MULTIRUN
    opening = _opens_for_sweep.set(sweeps and any(text.lstrip("+").startswith(f"{_NODE}.") for text in overrides))
    try:
        cfg = original(self, config_name, overrides, run_mode, *args, **kwargs)
    except ValueError as error:
        plain = next((text for text in overrides if re.fullmatch(_PLAIN_VALUE, text)), None)
        if plain is None:
            raise
        raise ConfigCompositionException(
            f"{plain}: the policy is an option of a config group, and this is no name of one.\n{_WHAT_TO_WRITE}"
        ) from error
    finally:
        _opens_for_sweep.reset(opening)
    # A sweep's own composition is nobody's job: its jobs are composed one by one, with their overrides.
    if not sweeps and not _is_tried.get():
        if _has_target(cfg) and not _has_node(cfg):
            _restore(self, cfg)
        if _has_node(cfg):
            _decide(cfg, lambda more: _try(self, config_name, [*overrides, *more], run_mode))
    return cfg


def _restore(loader: Any, cfg: DictConfig) -> None:
    """Take the record of a saved config that runs again from the ``hydra.yaml`` beside it, where `_decide` has put it."""
    try:
        saved = loader.repository.load_config("hydra.yaml")
        if saved is None or saved.provider != "main":
            return
        node = OmegaConf.select(saved.config, f"hydra.{_NODE}")
    except Exception:  # a file of that name may be anything: it is the application's
        return
    if _is_ours(node):
        from precision_policy.composition import config_tree

        config_tree.record(cfg, _NODE, OmegaConf.to_container(node))  # type: ignore[arg-type]  # of a mapping, it is one


def _try(loader: Any, config_name: str | None, overrides: list[str], run_mode: RunMode) -> DictConfig:
    """Compose with other overrides and leave the policy undecided."""
    trying = _is_tried.set(True)
    try:
        cfg: DictConfig = loader.load_configuration(config_name, overrides, run_mode)
    finally:
        _is_tried.reset(trying)
    return cfg


def _decide(cfg: DictConfig, compose: Callable[[list[str]], DictConfig]) -> None:
    node = cfg[_NODE]
    if node is True or node in _OPTIONS:
        raise ConfigCompositionException(
            f"{_NODE}={node}: the policy is an option of a config group, and as a plain key it does nothing.\n{_WHAT_TO_WRITE}"
        )
    if not _is_ours(node):
        return
    from precision_policy.composition import config_tree  # not at the top: applications without the policy never need them
    from precision_policy.composition.applying import apply
    from precision_policy.composition.settings import SettingError

    try:
        apply(cfg, list(cfg.hydra.overrides.task), compose)
    except SettingError as error:
        raise ConfigCompositionException(str(error)) from None
    if config_tree.has(cfg, "_target_") and config_tree.raw_value(cfg, "_target_") is not None:
        # The application instantiates its whole config: a node at the root would be an argument of its target.
        config_tree.move(cfg, _NODE, cfg.hydra)


def _merge(original: Callable[..., DictConfig], self: Any, defaults: Sequence[Any], repo: Any) -> DictConfig:
    """Merge the defaults list as Hydra does, into a typed root too, and open the policy's node for overrides.

    The options name only the settings that they change, so that they cost no time and never override what the application's
    own config says. Hydra would refuse to set the others; ``settings.py`` refuses unknown ones instead.
    """
    try:
        cfg = original(self, defaults=defaults, repo=repo)
    except ConfigCompositionException:
        ours = [default for default in defaults if str(default.config_path).startswith(f"{_NODE}/")]
        if not ours:
            raise
        # A typed or read-only root refuses a node that it does not know. Where it is refused again, that was not the reason.
        cfg = original(self, defaults=[default for default in defaults if default not in ours], repo=repo)
        with flag_override(cfg, ["struct", "readonly"], [False, False]):
            for default in ours:
                cfg.merge_with(self._load_single_config(default=default, repo=repo).config)
    if _opens_for_sweep.get() and not _has_node(cfg):
        with flag_override(cfg, ["struct", "readonly"], [False, False]):
            cfg[_NODE] = {}
            OmegaConf.set_struct(cfg[_NODE], False)
    elif _has_node(cfg) and (_is_ours(cfg[_NODE]) or (_opens_for_sweep.get() and isinstance(cfg[_NODE], DictConfig))):
        OmegaConf.set_struct(cfg[_NODE], False)
    return cfg


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
    """Give the job the policy's callback. Named in the config, it would need a whitelist entry in Hydra 1.4."""
    node = _node(config)
    if _is_ours(node) and node.get("enabled", True):
        from precision_policy.job.callback import JobCallback

        if not any(isinstance(callback, JobCallback) for callback in self.callbacks):
            self.callbacks.append(JobCallback(_node, _compose_again))
    original(self, config, *args, **kwargs)


def _compose_again(config: DictConfig, more: list[str]) -> DictConfig:
    """The job's config composed again with further overrides, to try advice before it is given."""
    from hydra.core.global_hydra import GlobalHydra

    words = [*config.hydra.overrides.hydra, *config.hydra.overrides.task, *more]
    return GlobalHydra.instance().config_loader().load_configuration(config.hydra.job.config_name, words, RunMode.RUN)


def _node(cfg: DictConfig) -> Any:
    """The policy's node of a job's config, or None."""
    if _has_node(cfg):
        return cfg[_NODE]
    if _has_target(cfg) and "hydra" in cfg:
        from precision_policy.composition import config_tree

        return dict(config_tree.children(cfg.hydra)).get(_NODE)  # where `_decide` has moved it
    return None


def _has_node(cfg: DictConfig) -> bool:
    """Whether the config has the policy's node. The keys first: where a key is missing, ``in`` makes and catches an error."""
    return _NODE in cfg.keys() and _NODE in cfg  # noqa: SIM118


def _has_target(cfg: DictConfig) -> bool:
    return "_target_" in cfg.keys()  # noqa: SIM118 - in would resolve an interpolation


def _is_ours(node: Any) -> bool:
    """Whether this is the node of a chosen option, not settings that wait for one or something of the application's own."""
    return isinstance(node, DictConfig) and "decision" in node
