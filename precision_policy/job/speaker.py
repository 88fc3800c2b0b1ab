"""Who speaks for the job: one logger, on rank zero, and once for what is said once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from precision_policy.job import ranks

_LOG = logging.getLogger("precision_policy")


class Speaker:
    """Logs on rank zero.

    Args:
        said: the names of what was said already, by a speaker that this one goes on for.
    """

    def __init__(self, said: Iterable[str] = ()) -> None:
        self.said = set(said)
        self._lock = threading.Lock()

    def say(self, level: int, text: str, **kwargs: Any) -> None:
        """Log one record on rank zero."""
        if ranks.is_rank_zero():
            # An application's logging.config.dictConfig disables all loggers that exist, unless told otherwise.
            _LOG.disabled = False
            _LOG.log(level, "%s", text, **kwargs)

    def is_first(self, what: str) -> bool:
        """Whether this is the first time that ``what`` is to be said in this job, on whatever rank."""
        with self._lock:
            first = what not in self.said
            self.said.add(what)
        return first

    def forget(self, what: str) -> None:
        """Let ``what`` be said once more, since it was taken back."""
        with self._lock:
            self.said.discard(what)

    def say_once(self, what: str, level: int, text: str, **kwargs: Any) -> None:
        """Log once in a job."""
        if self.is_first(what):
            self.say(level, text, **kwargs)
