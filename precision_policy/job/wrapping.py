"""Wrapping a method for the time of a job, where there is no public hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(kind: type, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Call ``around(original, self, *args, **kwargs)`` in place of a method; the result undoes it.

    Whoever has wrapped the method on top keeps this wrapper in between, so ``around`` must then do nothing of its own.
    """
    original = getattr(kind, name)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    def undo() -> None:
        if getattr(kind, name) is wrapper:
            setattr(kind, name, original)

    setattr(kind, name, wrapper)
    return undo
