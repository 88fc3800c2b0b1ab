"""The one module that touches Hydra's internals: it makes the decision part of composing a config.

Why here and nowhere else: by the time a callback sees a job, Hydra has already copied the config for the task and written
``.hydra/config.yaml``; the Compose API and ``--cfg`` call no callback at all. Composition is the only step that a plain
run, every job of a sweep in whatever process, ``hydra.compose`` and ``--cfg`` share, and Hydra has no public hook there.
Should a future Hydra move it, ``job.py`` finds no decision in the job's config and stops the job.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

_NODE = "precision_policy"
_MARK = "_precision_policy_wrap"


def install() -> None:
    """Wrap what must be wrapped, once however often it is called: Hydra 1.3 may execute the plugin's module again."""
    _wrap(ConfigLoaderImpl, "_load_configuration_impl", _load)
    _wrap(ConfigLoaderImpl, "_compose_config_from_defaults_list", _merge)
    _wrap(Callbacks, "on_job_start", _job_start)


def _wrap(kind: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(kind, name, None)
    if original is None or hasattr(original, _MARK):  # a Hydra without it: job.py stops the jobs that ask for the policy
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    setattr(kind, name, wrapper)


def _load(original: Callable[..., DictConfig], self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
    """Compose as Hydra does, then let the policy decide."""
    cfg = original(self, *args, **kwargs)
    # A sweep's own composition is nobody's job: its jobs are composed one by one, with their overrides.
    if _NODE in cfg and kwargs.get("run_mode") is not RunMode.MULTIRUN:
        _decide(cfg)
    return cfg


def _decide(cfg: DictConfig) -> None:
    node = cfg[_NODE]
    if node is True or node in ("on", "warn", "strict"):
        raise ConfigCompositionException(
            f"{_NODE}={node}: the policy is an option of a config group, and as a plain key it does nothing.\n"
            f'Write +{_NODE}=on on the command line, or - {_NODE}: "on", quoted, in a defaults list.'
        )
    if not _is_ours(node):
        return
    from precision_policy.policy import apply  # not at the top: applications without the policy never need it
    from precision_policy.settings import SettingError

    try:
        apply(cfg, list(cfg.hydra.overrides.task))
    except SettingError as error:
        raise ConfigCompositionException(str(error)) from None


def _merge(original: Callable[..., DictConfig], self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
    """Merge the defaults list as Hydra does, into a typed root too, and open the policy's node for overrides.

    The options hold no placeholders for the settings that they leave alone, so that they neither cost time nor override what
    the application's config says. Hydra would refuse to set an absent key; ``settings.py`` refuses unknown ones instead.
    """
    try:
        cfg = original(self, *args, **kwargs)
    except ConfigCompositionException as error:
        refused = f"Key '{_NODE}' not in" in str(error) or "read-only" in str(error)
        if not refused or set(kwargs) != {"defaults", "repo"}:
            raise
        cfg = _merge_into_typed_root(original, self, **kwargs)
    if _NODE in cfg and _is_ours(cfg[_NODE]):
        OmegaConf.set_struct(cfg[_NODE], False)
    return cfg


def _merge_into_typed_root(
    original: Callable[..., DictConfig], self: ConfigLoaderImpl, *, defaults: list[Any], repo: Any
) -> DictConfig:
    ours = [default for default in defaults if str(default.config_path).startswith(f"{_NODE}/")]
    cfg = original(self, defaults=[default for default in defaults if default not in ours], repo=repo)
    with flag_override(cfg, ["struct", "readonly"], [False, False]):
        for default in ours:
            cfg.merge_with(self._load_single_config(default=default, repo=repo).config)
    return cfg


def _job_start(original: Callable[..., None], self: Callbacks, config: DictConfig, *args: Any, **kwargs: Any) -> None:
    """Give a job the callback of its option where a sweep chooses the option: Hydra takes callbacks from the sweep's config."""
    if _is_on(config):
        from precision_policy.job import JobCallback

        if not any(isinstance(callback, JobCallback) for callback in self.callbacks):
            self.callbacks.append(JobCallback())
    original(self, config, *args, **kwargs)


def _is_on(cfg: DictConfig) -> bool:
    node = cfg.get(_NODE)
    return _is_ours(node) and bool(node.get("enabled", True))


def _is_ours(node: Any) -> bool:
    """Whether this is the node of a chosen option, not settings that wait for one or something of the application's own."""
    return isinstance(node, DictConfig) and "decision" in node
