"""The watch in a process that the job spawns: a fresh interpreter, in which Hydra never runs. Nothing here imports torch.

So the start of a process is wrapped while the job runs: the plan travels in what is pickled for the process, and arms a watch
where it arrives. A forked process has the watch anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from precision_policy.job.plan import Plan
from precision_policy.job.wrapping import wrap

if TYPE_CHECKING:
    from precision_policy.job.watch import Watch


def follow(watch: Watch) -> Callable[[], None]:
    """Let the watch go along into every process that is started from now on; the result ends that."""

    def start(original: Callable[..., None], process: BaseProcess) -> None:
        if watch.armed:
            process._precision_policy = _Passenger(watch)  # type: ignore[attr-defined]  # so that it is pickled with the process
        original(process)

    return wrap(BaseProcess, "start", start)


class _Passenger:
    """Stands for a watch while its process is pickled; unpickled, it is a watch that is armed."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __reduce__(self) -> Any:
        return arm, (self._watch.plan, self._watch.said)


def arm(plan: Plan, said: set[str]) -> Watch | None:
    """Arm the job's watch in this process, for as long as that lives; called by unpickling it.

    By now the process has imported its main module and what it will run. A worker that needs no torch for these, one that
    splits text into tokens, say, is not made to import it.

    Args:
        plan: the job's.
        said: what the job has said already and need not hear again.
    """
    if "torch" not in sys.modules:
        return None
    from precision_policy.job.watch import Watch

    watch = Watch(plan, said)
    watch.arm()
    return watch
