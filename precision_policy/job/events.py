"""What happens to the optimizers of a job, told to those who listen.

torch has public hooks before and after a step. It has none for the construction of an optimizer, for the step itself inside
those hooks, and for the loading of a state that would survive ``copy.deepcopy``. There, methods of ``torch.optim`` are wrapped
for the time of the job, and put back at its end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precision_policy.job.speaker import Speaker
from precision_policy.job.wrapping import wrap


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
        # Nothing is wrapped for a listener that leaves the step as it is.
        self._around_step = [one for one in listeners if type(one).around_step is not Listener.around_step]
        self._speaker = speaker
        self._option = option
        self._undo = contextlib.ExitStack()
        self._classes: set[type] = set()
        # A wrapper that somebody has wrapped in turn stays where it is after the end, and must then do nothing.
        self.on = False

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

    def end(self) -> None:
        """Leave torch as it was, then tell the listeners; a second call does nothing."""
        self.on = False
        self._undo.close()
        self._classes.clear()

    def serve(self, kind: type) -> None:
        """Go around ``step`` of the ``torch.optim`` classes among the bases of an optimizer's class.

        The innermost class is the one that updates parameters: a subclass of the application's own may call it with other
        arguments, several times, or not at all. torch itself replaces ``step`` on a class when its first optimizer is made, so
        each class that has a ``step`` of its own is looked at.
        """
        if not self._around_step:
            return
        for base in kind.__mro__:
            if base not in self._classes and _updates_parameters(base):
                self._classes.add(base)
                self._go_around(base)

    def _go_around(self, base: type) -> None:
        present = base.__dict__["step"]
        is_hooked = getattr(present, "hooked", False)  # torch's mark on a step that runs its step hooks
        raw = present.__wrapped__ if is_hooked else present

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no type
        @functools.wraps(raw)
        def inner(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return raw(optimizer, *args, **kwargs)
            return self._step(raw, optimizer, args, kwargs)

        replaced = _hooked(inner) if is_hooked else inner

        def put_back() -> None:
            found = base.__dict__.get("step")
            if found is replaced:
                base.step = present  # type: ignore[attr-defined]  # a class that updates parameters has it
            elif getattr(found, "hooked", False) and getattr(found, "__wrapped__", None) is replaced:
                # torch has put its hooks around since: so they shall stay, around torch's own step.
                base.step = _hooked(raw)  # type: ignore[attr-defined]  # as above

        base.step = replaced  # type: ignore[attr-defined]  # as above
        self._undo.callback(put_back)

    def _init(self, init: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        init(optimizer, *args, **kwargs)
        self._tell("made", optimizer)

    def _patch_step_function(self, patch: Callable[..., None], optimizer: Optimizer) -> None:
        """Every optimizer comes through here, unpickled and copied ones too, before its first step."""
        patch(optimizer)
        if self.on:
            self.serve(type(optimizer))

    def _step(self, raw: Callable[..., Any], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = raw
        for listener in reversed(self._around_step):
            step = _inside(listener.around_step, step)
        return step(optimizer, *args, **kwargs)

    def _load(self, load: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        if self.on:
            for listener in reversed(self._listeners):
                load = _inside(listener.around_load, load)
        load(optimizer, *args, **kwargs)

    def _about_to_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tell("about_to_step", optimizer)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tell("stepped", optimizer)

    def _tell(self, event: str, optimizer: Optimizer) -> None:
        if self.on:
            for listener in self._listeners:
                self._guarded(getattr(listener, event), optimizer)

    def _guarded(self, call: Callable[..., None], *args: Any) -> None:
        """A diagnosis ends no job, except by the error that ``strict`` asks for."""
        try:
            call(*args)
        except StopJobError:
            raise
        except Exception:
            text = f"{self._option}: an optimizer could not be judged; the job goes on"
            self._speaker.say_once("failed", logging.WARNING, lambda: text, exc_info=True)


def _updates_parameters(kind: type) -> bool:
    """Whether a class is one of ``torch.optim`` that has a step of its own, or one that torch gave one."""
    return kind is not Optimizer and kind.__module__.startswith("torch.optim.") and "step" in kind.__dict__


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
