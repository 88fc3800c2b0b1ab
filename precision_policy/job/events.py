"""What happens to the optimizers of a job, told to those who listen.

torch has public hooks before and after a step. It has none for the construction of an optimizer, for the step itself inside
those hooks, and for the loading of a state that would survive ``copy.deepcopy``. There, methods of ``torch.optim`` are wrapped
for the time of the job, and put back at its end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_policy.job.speaker import Speaker
from precision_policy.job.wrapping import wrap

# Steps that were read and found to update parameters as those of torch.optim do: transformers 5.23, optimization.py.
SERVED_BY_NAME = ("transformers.optimization.Adafactor.step",)


class StopJobError(RuntimeError):
    """The one kind of exception by which a listener ends a job: what ``strict`` asks for."""


class Listener:
    """Hears of the job's optimizers. Each method may be left as it is."""

    def made(self, optimizer: Optimizer) -> None:
        """Hear that an optimizer has its parameter groups; the constructor of a subclass may still be at work."""

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Hear that ``step`` was called. The application's own step hooks and a closure come after this."""

    def around_step(self, optimizer: Optimizer, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the step of the ``torch.optim`` class, inside all step hooks.

        Args:
            optimizer: the optimizer.
            step: to be called as ``step(optimizer, *args, **kwargs)``, once. It takes the closure, if there is any.
            args: what ``step`` got, the optimizer left out.
            kwargs: what it got by name.

        Returns:
            What ``step`` returns.
        """
        return step(optimizer, *args, **kwargs)

    def stepped(self, optimizer: Optimizer) -> None:
        """Hear that ``step`` has come to its end. It is not told where ``step`` raised."""

    def around_load(self, optimizer: Optimizer, load: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Load a state dict, by calling ``load(optimizer, *args, **kwargs)`` once."""
        return load(optimizer, *args, **kwargs)

    def end(self) -> None:
        """Hear that the job is over."""


class Events:
    """Tells listeners what happens to optimizers, from :meth:`start` to :meth:`end`.

    Args:
        listeners: told in this order, and of the end in reverse.
        speaker: says that a listener failed.
        option: how the option that is on is called, such as ``precision_policy=on``.
    """

    def __init__(self, listeners: Sequence[Listener], speaker: Speaker, option: str = "precision_policy") -> None:
        self._listeners = list(listeners)
        # A listener is not called for what it leaves as it is: that would cost a microsecond at every step.
        self._around_step = self._methods("around_step")
        self._around_load = self._methods("around_load")
        self._told = {event: self._methods(event) for event in ("made", "about_to_step", "stepped")}
        self._speaker = speaker
        self._option = option
        self._undo = contextlib.ExitStack()
        self._classes: set[type] = set()
        self._inner: set[Any] = set()
        # Optimizers may be made by several threads.
        self._lock = threading.RLock()
        # A wrapper that somebody has wrapped in turn stays where it is after the end, and must then do nothing.
        self.on = False

    def _methods(self, name: str) -> list[Callable[..., Any]]:
        """A method of those listeners that have one of their own."""
        left = getattr(Listener, name)
        return [getattr(listener, name) for listener in self._listeners if getattr(type(listener), name) is not left]

    def start(self) -> None:
        """Listen from now on."""
        self.on = True
        for listener in self._listeners:
            self._undo.callback(self._guarded, listener.end)
        self._undo.callback(wrap(Optimizer, "__init__", self._init))
        self._undo.callback(wrap(Optimizer, "_patch_step_function", self._patch_step_function))
        self._undo.callback(wrap(Optimizer, "load_state_dict", self._load))
        self._undo.callback(register_optimizer_step_pre_hook(self._about_to_step).remove)
        self._undo.callback(register_optimizer_step_post_hook(self._stepped).remove)
        if self._around_step:
            self._serve_present()

    def end(self) -> None:
        """Leave torch as it was, then tell the listeners; a second call does nothing."""
        self.on = False
        self._undo.close()
        self._classes.clear()
        self._inner.clear()

    def serve(self, kind: type) -> None:
        """Go around the ``step`` of ``torch.optim`` in an optimizer's class and its bases.

        That step is the one that updates parameters: a subclass of the application's own may call it with other arguments,
        several times, or not at all. torch itself replaces ``step`` on a class when its first optimizer is made, so each class
        that has a ``step`` of its own is looked at.
        """
        if not self._around_step:
            return
        with self._lock:
            for base in kind.__mro__:
                if base not in self._classes:
                    self._classes.add(base)
                    if _updates_parameters(base):
                        self._go_around(base)

    def reaches(self, optimizer: Optimizer) -> bool:
        """Whether a call of ``optimizer.step`` comes here: not where somebody took torch's step before its class was served."""
        step: Any = optimizer.step
        step = getattr(step, "__func__", step)
        while step not in self._inner:
            if not hasattr(step, "__wrapped__"):
                # A step of the application's own calls torch's by the name of its class.
                return not _is_torch_step(step)
            step = step.__wrapped__
        return True

    def _serve_present(self) -> None:
        """Serve the classes of the optimizers that were made before: torch has put its hooks around their step."""
        for kind in _all_subclasses(Optimizer):
            if getattr(kind.__dict__.get("step"), "hooked", False):
                self.serve(kind)

    def _go_around(self, base: type) -> None:
        present = base.__dict__["step"]
        raw = _inside_hooks(present)

        @functools.wraps(raw)
        def inner(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return raw(optimizer, *args, **kwargs)
            return self._step(raw, optimizer, args, kwargs)

        self._inner.add(inner)
        replaced = inner if raw is present else _hooked(inner)

        def put_back() -> None:
            if base.__dict__.get("step") is replaced:
                base.step = present  # type: ignore[attr-defined]  # a class that updates parameters has it
            # torch may have put its hooks around since, on this class or on one that inherits from it. They shall stay, around
            # torch's own step.
            for derived in (base, *_all_subclasses(base)):
                found = derived.__dict__.get("step")
                if found is not present and _inside_hooks(found) is inner:
                    derived.step = _hooked(raw)  # type: ignore[attr-defined]  # as above

        base.step = replaced  # type: ignore[attr-defined]  # as above
        self._undo.callback(put_back)

    def _init(self, init: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        init(optimizer, *args, **kwargs)
        self._tell("made", optimizer)

    def _patch_step_function(self, patch: Callable[..., None], optimizer: Optimizer) -> None:
        """Every optimizer comes through here, unpickled and copied ones too, before its first step."""
        # Before torch puts its hooks around a step that a class inherits: what it then finds is already the one that tells.
        if self.on:
            self.serve(type(optimizer))
        patch(optimizer)

    # What is disabled is not the wrapper: torch 2.4 takes a bound method around it for the function inside, and loses `self`.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no type
    def _step(self, raw: Callable[..., Any], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = raw
        for around in reversed(self._around_step):
            step = _inside(around, step)
        return step(optimizer, *args, **kwargs)

    def _load(self, load: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        if self.on:
            for around in reversed(self._around_load):
                load = _inside(around, load)
        load(optimizer, *args, **kwargs)

    def _about_to_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tell("about_to_step", optimizer)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tell("stepped", optimizer)

    def _tell(self, event: str, optimizer: Optimizer) -> None:
        if self.on:
            for hear in self._told[event]:
                self._guarded(hear, optimizer)

    def _guarded(self, call: Callable[..., None], *args: Any) -> None:
        """A diagnosis ends no job, except by the error that ``strict`` asks for."""
        try:
            call(*args)
        except StopJobError:
            raise
        except Exception:
            text = f"{self._option}: an optimizer could not be judged; the job goes on"
            self._speaker.say_once("failed", logging.WARNING, text, exc_info=True)


def _updates_parameters(kind: type) -> bool:
    """Whether a class has a step of its own that is ``torch.optim``'s, which torch also gives to classes that inherit it."""
    return kind is not Optimizer and _is_torch_step(_inside_hooks(kind.__dict__.get("step")))


def _is_torch_step(step: Any) -> bool:
    module = getattr(step, "__module__", None) or ""
    name = f"{module}.{getattr(step, '__qualname__', '')}"
    return module.startswith("torch.optim.") or name in SERVED_BY_NAME


def _inside_hooks(step: Any) -> Any:
    """The step inside the wrapper by which torch runs step hooks; any other thing as it is."""
    is_hooked = getattr(step, "hooked", False)  # torch's mark on its wrapper
    return step.__wrapped__ if is_hooked else step


def _all_subclasses(kind: type) -> list[type]:
    """The classes that derive from a class, at any depth."""
    found: list[type] = []
    derived: type
    for derived in kind.__subclasses__():
        found.append(derived)
        found += _all_subclasses(derived)
    return found


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A raw step inside torch's step hooks, as ``Optimizer._patch_step_function`` makes it."""
    hooked: Any = Optimizer.profile_hook_step(step)
    hooked.hooked = True
    return hooked  # type: ignore[no-any-return]  # it is a function


def _inside(around: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """``inner`` with a listener around it."""

    def call(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return around(optimizer, inner, args, kwargs)

    return call
