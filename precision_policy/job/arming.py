"""What a job arms, in one list: used by the job itself and by each process that it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from precision_policy.job import spawned
from precision_policy.job.speaker import Speaker
from precision_policy.record import Record

if TYPE_CHECKING:
    from precision_policy.job.events import Listener


def arm(record: Record, option: str, said: Iterable[str] = ()) -> contextlib.ExitStack:
    """Arm all that a job needs, in this process and in those that it starts.

    Args:
        record: the job's.
        option: how the option that is on is called, such as ``precision_policy=on``.
        said: the names of what the job has said already and need not say again.

    Returns:
        What undoes it all when it is closed.
    """
    undo = contextlib.ExitStack()
    if not record.enabled:
        return undo
    # Imported here and not at the top: Hydra imports this module for --multirun too, where only the jobs need torch.
    from precision_policy.job.events import Events

    speaker = Speaker(said)
    events = Events(_make_listeners(record, speaker, option), speaker, option)
    events.start()
    undo.callback(events.end)
    undo.enter_context(spawned.follow(arm, record, option, speaker))
    return undo


def _make_listeners(record: Record, speaker: Speaker, option: str) -> list[Listener]:
    """In the order in which they hear of an event: the confirmation asks all that come before it."""
    from precision_policy.job.compute import Compute
    from precision_policy.job.confirmation import Confirmation
    from precision_policy.job.monitor import Monitor
    from precision_policy.job.storage import Storage

    compute = Compute(record, speaker, option)
    if record.master_weights:
        from precision_policy.job.master_weights import MasterWeights

        masters = MasterWeights()
        listeners: list[Listener] = [Storage(record, speaker, option, compute, masters), masters]
    else:
        masters = None
        listeners = [Storage(record, speaker, option, compute)]
    listeners += [Confirmation(speaker, option, compute, masters, wants_bf16=record.compute_dtype is None), compute]
    if record.monitor_every:
        listeners.append(Monitor(record.monitor_every, speaker, option))
    return listeners
