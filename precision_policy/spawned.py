"""The watch in a process that the job spawned: a fresh interpreter, in which Hydra never runs. Nothing here imports torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from precision_policy.watch import Watch


def arm(asked: tuple[Any, ...], action: Literal["warn", "error"], said: set[str]) -> Watch | None:
    """Arm the watch of the job in this process, for as long as that lives; called by unpickling it.

    By now the process has imported its main module and what it will run. A worker that needs no torch for these, one that
    splits text into tokens, say, is not made to import it.

    Args:
        asked: the fields of :class:`precision_policy.report.Asked`.
        action: what an optimizer that would lose updates leads to.
        said: what the job has said already and need not hear again.
    """
    if "torch" not in sys.modules:
        return None
    from precision_policy.report import Asked
    from precision_policy.watch import Watch

    watch = Watch(Asked(*asked), action, said)
    watch.arm()
    return watch
