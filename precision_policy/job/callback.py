"""The Hydra callback that each job gets: it says what was decided, and keeps watch while the job runs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from precision_policy.job import arming, ranks
from precision_policy.record import NOT_FOUND, Decision, Record

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

_LOG = logging.getLogger("precision_policy")


class JobCallback(Callback):
    """Speaks and watches for every job of a run or sweep; there is one for all jobs of a sweep in one process.

    Args:
        find: gives the policy's node of a job's config, or None.
        compose: composes a job's config with further overrides, so that advice is tried before it is given.
    """

    def __init__(self, find: Callable[[DictConfig], Any], compose: Callable[[DictConfig, list[str]], DictConfig]) -> None:
        self._find = find
        self._compose = compose
        self._stops: list[Callable[[], None]] = []

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Log the decision and arm the watch.

        Raises:
            SystemExit: no decision was made when the config was composed. No other kind of exception would do: Hydra
                turns those that a callback raises into warnings, and the job would run without its policy.
        """
        _call_all(self._stops)
        settings = self._find(config)  # absent where a sweep deletes it
        if not isinstance(settings, DictConfig) or not settings.get("enabled", True):
            return
        node: dict[str, Any] = OmegaConf.to_container(settings)  # type: ignore[assignment]  # of a mapping, it is one
        if not node.get("decision"):
            raise SystemExit(
                "precision_policy is on, but nothing was decided when the config was composed: this version of "
                "hydra-precision-policy does not know this version of Hydra.\n"
                "Install a version that does, or switch the policy off (precision_policy=off)."
            )
        option = _option(config)
        record = Record.read({"master_weights": False, **node})
        for decision in record.decisions:
            if ranks.is_rank_zero():
                _LOG.log(logging.WARNING if decision.rule in NOT_FOUND else logging.INFO, "%s: %s", option, _line(decision))
        self._stops = [arming.arm(record, option).close]
        # Hydra 1.3 ends a job that KeyboardInterrupt stops without telling its callbacks.
        weakref.finalize(self, _call_all, self._stops)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Leave torch as it was before the job."""
        _call_all(self._stops)


def _line(decision: Decision) -> str:
    if decision.rule != "set":
        return f"nothing set ({decision.rule}): {decision.reason}"
    before = "unset" if decision.before is None else decision.before
    return f"{decision.key}: {before} -> {decision.after}: {decision.reason}"


def _option(config: DictConfig) -> str:
    """How the option that is on is called on the command line; a saved config that runs again does not tell."""
    choice = OmegaConf.select(config, "hydra.runtime.choices.precision_policy", default=None)
    return f"precision_policy={choice}" if choice else "precision_policy"


def _call_all(stops: list[Callable[[], None]]) -> None:
    while stops:
        stops.pop()()
