"""The Hydra callback that each job gets: it says what was decided, and keeps watch while the job runs."""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from precision_policy.job.speaker import Speaker
from precision_policy.record import Decision, Record

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn


class JobCallback(Callback):
    """Speaks and watches for every job of a run or sweep; there is one for all jobs of a sweep in one process."""

    def __init__(self) -> None:
        self._armed = contextlib.ExitStack()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Log the decisions, and arm what the job asks for."""
        self._armed.close()
        node = OmegaConf.select(config, "hydra.precision_policy")  # absent in a job of a sweep that chooses no option
        if node is None or not node.enabled:
            return
        record = Record.read(OmegaConf.to_container(node))  # type: ignore[arg-type]  # of a mapping, it is one
        option = _option(config)
        speaker = Speaker()
        for decision in record.decisions:
            speaker.say(logging.INFO, f"{option}: {describe(decision)}")
        # Imported here and not at the top: Hydra imports this module for --multirun too, where only the jobs need torch.
        from precision_policy.job import arming

        self._armed = arming.arm(record, option)
        # Hydra 1.3 ends a job that KeyboardInterrupt stops without telling its callbacks.
        weakref.finalize(self, self._armed.close)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Leave torch as it was before the job."""
        self._armed.close()


def describe(decision: Decision) -> str:
    """One decision as the text that reports it."""
    if decision.rule != "set":
        return f"nothing set ({decision.rule}): {decision.reason}"
    before = "unset" if decision.before is None else decision.before
    return f"{decision.key}: {before} -> {decision.after}: {decision.reason}"


def _option(config: DictConfig) -> str:
    """How the option that is on is called on the command line; a saved config that runs again does not tell."""
    choice = OmegaConf.select(config, "hydra.runtime.choices.precision_policy")
    return f"precision_policy={choice}" if choice else "precision_policy"
