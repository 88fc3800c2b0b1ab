"""Wrapping a method for the time of a job, where there is no public hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(place: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Call ``around(original, *args, **kwargs)`` in place of a method of a class, or a function of a module.

    Whoever has wrapped it in turn keeps this wrapper after its end. It then calls what stood there before, and nothing else.

    Args:
        place: the class or module.
        name: of the method or function.
        around: gets what stood there before, and the arguments.

    Returns:
        What undoes it. Where there is no such method, as in another version of torch, it does nothing.
    """
    original = getattr(place, name, None)
    if original is None:
        return lambda: None

    is_over = False

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if is_over else around(original, *args, **kwargs)

    def undo() -> None:
        nonlocal is_over
        is_over = True
        if getattr(place, name) is wrapper:
            setattr(place, name, original)

    setattr(place, name, wrapper)
    return undo
