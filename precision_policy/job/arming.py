"""The one list of what a job arms."""

from __future__ import annotations

import contextlib

from precision_policy.job import plan
from precision_policy.record import Record


def arm(record: Record, option: str) -> contextlib.ExitStack:
    """Arm what the record asks for; closing the result undoes it.

    Args:
        record: what was decided, and the settings that the job acts on.
        option: how the option that is on is called, such as ``precision_policy=on``.
    """
    armed = contextlib.ExitStack()
    todo = plan.read(record, option)
    if todo.watches:
        from precision_policy.job import spawned
        from precision_policy.job.watch import Watch

        watch = Watch(todo)
        watch.arm()
        armed.callback(watch.disarm)
        armed.callback(spawned.follow(watch))
    if todo.monitor:
        from precision_policy.job.monitor import Monitor

        monitor = Monitor(todo.monitor, todo.option)
        monitor.start()
        armed.callback(monitor.stop)
    return armed
