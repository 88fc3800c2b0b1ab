"""The policy in a process that the job starts: a fresh interpreter, in which Hydra never runs. Nothing here imports torch.

So the start of a process is wrapped while the job runs: the record travels in what is pickled for the process, and arms there
what the job has armed. A forked process has all of it anyway.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from precision_policy.job.speaker import Speaker
from precision_policy.job.wrapping import wrap
from precision_policy.record import Record

Arm = Callable[[Record, str, Iterable[str]], contextlib.ExitStack]


@contextlib.contextmanager
def follow(arm: Arm, record: Record, option: str, speaker: Speaker) -> Iterator[None]:
    """Arm every process that is started inside this context as the job is armed.

    Args:
        arm: arms a process, from a record, an option, and the names of what was said already. It is pickled by its name.
        record: the job's.
        option: how the option that is on is called.
        speaker: knows what was said already, and need not be said again.
    """
    passenger = _Passenger(arm, record, option, speaker)

    def start(original: Callable[..., None], process: BaseProcess) -> None:
        process._precision_policy = passenger  # type: ignore[attr-defined]  # is pickled with it
        original(process)

    unwrap = wrap(BaseProcess, "start", start)
    try:
        yield
    finally:
        unwrap()


class _Passenger:
    """Is pickled with a process; where it is unpickled, it arms what the job has armed."""

    def __init__(self, arm: Arm, record: Record, option: str, speaker: Speaker) -> None:
        self._arm = arm
        self._record = record
        self._option = option
        self._speaker = speaker

    def __reduce__(self) -> Any:
        return arm_here, (self._arm, self._record, self._option, frozenset(self._speaker.said))


def arm_here(arm: Arm, record: Record, option: str, said: frozenset[str]) -> contextlib.ExitStack | None:
    """Arm this process for as long as it lives; called by unpickling.

    By now the process has imported its main module and what it will run. A worker that needs no torch for these, one that
    splits text into tokens, say, is not made to import it.

    Args:
        arm: arms it.
        record: the job's.
        option: how the option that is on is called.
        said: what the job has said already.
    """
    if "torch" not in sys.modules:
        return None
    try:
        return arm(record, option, said)
    except Exception:  # a diagnosis ends no process of the application's
        text = f"{option}: a process that the job has started is not watched"
        logging.getLogger("precision_policy").warning(text, exc_info=True)
        return None
