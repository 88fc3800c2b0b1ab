"""The Hydra callback that the config options install: says what was decided, and keeps watch while the job runs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from precision_policy import ranks
from precision_policy.policy import asked

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

_LOG = logging.getLogger("precision_policy")


class JobCallback(Callback):
    """Speaks and watches for every job of a run or sweep; Hydra makes one for all jobs of a sweep in one process."""

    def __init__(self) -> None:
        self._stops: list[Callable[[], None]] = []

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Log the decision and arm the watch.

        Raises:
            SystemExit: no decision was made when the config was composed. No other kind of exception would do: Hydra
                turns those that a callback raises into warnings, and the job would run without its policy.
        """
        self._stop_watching()
        settings = config.get("precision_policy")  # absent where a sweep deletes it
        if not isinstance(settings, DictConfig) or not settings.get("enabled", True):
            return
        node: dict[str, Any] = OmegaConf.to_container(settings)  # type: ignore[assignment]  # of a mapping, it is one
        if not node.get("decision"):
            raise SystemExit(
                "precision_policy is on, but nothing was decided when the config was composed: this version of "
                "hydra-precision-policy does not know this version of Hydra.\n"
                "Install a version that does, or switch the policy off (precision_policy=off)."
            )
        pairs = node["decision"] if node.get("pairs") else {None: node["decision"]}
        if ranks.is_rank_zero():
            for decision in pairs.values():
                _LOG.info(line(decision))
        if node["bf16_adam"] == "ignore" or all(decision["rule"] == "peft" for decision in pairs.values()):
            return
        # Here and not at the top: Hydra imports this module for --multirun too, where only the jobs need torch.
        from precision_policy.monitor import Monitor
        from precision_policy.report import Asked
        from precision_policy.watch import Watch

        fix, fp32_by = asked(config)
        watch = Watch(Asked(fix, fp32_by, node["sample"]), node["bf16_adam"])
        watch.arm()
        self._stops = [watch.disarm]
        if node["monitor"]["every"]:
            monitor = Monitor(node["monitor"]["every"])
            monitor.start()
            self._stops.append(monitor.stop)
        # Hydra 1.3 ends a job that KeyboardInterrupt stops without telling its callbacks.
        weakref.finalize(self, _call_all, self._stops)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Leave torch as it was before the job."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        _call_all(self._stops)


def _call_all(stops: list[Callable[[], None]]) -> None:
    while stops:
        stops.pop()()


def line(decision: dict[str, Any]) -> str:
    """One decision as the log line that reports it."""
    if decision["rule"] != "set":
        return f"nothing set ({decision['rule']}): {decision['reason']}"
    before = "unset" if decision["before"] is None else decision["before"]
    return f"{decision['key']}: {before} -> {decision['after']}: {decision['reason']}"
