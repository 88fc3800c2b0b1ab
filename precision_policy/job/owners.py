"""The outermost modules that are called and own an optimizer's parameters: what the job calls its models, whatever wraps them.

They are found through ``torch.nn.Module.__call__``, which is replaced until each followed parameter's owner was called. A hook
would not do: ``torch.compile`` traces hooks, and warns of global ones. It traces what is in the place of ``__call__`` as well;
so that is a function of this module, without a closure, in which the graph would find another value once torch's is back.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.variables import functions
from torch.nn.utils import stateless
from torch.optim import Optimizer

Found = Callable[[nn.Module, Sequence[torch.Tensor], bool], None]

# torch before 2.7 does not tell its export from other compilation; then what is not traced by torch.compile is one.
_is_in_export: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)


def _takes_modules_as_constants() -> bool:
    """Whether torch.compile hands a module on to what it calls while it traces: 2.13 does, 2.4 raises an error."""
    convert = getattr(functions, "invoke_and_store_as_constant", None)
    inner = convert.__code__.co_consts if convert is not None else ()
    return any("UserDefinedObjectVariable" in getattr(code, "co_names", ()) for code in inner)


_looks_in_graphs = _takes_modules_as_constants()
_looking: list[Owners] = []
_is_replaced = False
_original_call: Callable[..., Any] = nn.Module.__call__
_original_functional_call: Callable[..., Any] = stateless._functional_call


def is_exporting() -> bool:
    """Whether what is called now goes into a program that outlives the job: ``torch.export`` or ``torch.jit.trace``."""
    if torch._C._get_tracing_state() is not None:
        return True
    if _is_in_export is not None:
        return _is_in_export()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


@functools.wraps(nn.Module.__call__)
def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In the place of ``torch.nn.Module.__call__``."""
    if not is_exporting():
        if torch.compiler.is_dynamo_compiling():
            if _looks_in_graphs:
                _look_while_compiling(module)
        else:
            for owners in tuple(_looking):  # who finds what it looks for leaves the list
                owners.look(module)
    return _original_call(module, *args, **kwargs)


@functools.wraps(stateless._functional_call)
def _functional_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In the place of torch's, which puts other tensors in the place of a module's parameters, then calls the module."""
    if not is_exporting() and not torch.compiler.is_dynamo_compiling():
        for owners in tuple(_looking):
            owners.look(module)
    return _original_functional_call(module, *args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no type
def _look_while_compiling(module: nn.Module) -> None:
    """Look while the caller is traced: this leaves nothing in the graph."""
    for owners in tuple(_looking):
        owners.look(module, in_graph=True)


def _replace() -> None:
    """Put ours in the place of torch's two functions, each where it is not there already."""
    global _is_replaced, _original_call, _original_functional_call  # noqa: PLW0603 - one function in the process, without a closure
    # Somebody's wrapper around ours may still be installed. It calls ours, which must not call it in turn.
    is_wrapped = _is_replaced and nn.Module.__call__ is not _original_call
    if not is_wrapped:
        _original_call = nn.Module.__call__
        nn.Module.__call__ = _call  # type: ignore[method-assign]  # until the owners were called
        _is_replaced = True
    if stateless._functional_call is not _functional_call:
        _original_functional_call = stateless._functional_call
        stateless._functional_call = _functional_call


def _put_back() -> None:
    """Leave torch as it was. Whoever has replaced ``__call__`` in turn keeps ours, which then does nothing."""
    global _is_replaced  # noqa: PLW0603 - as above
    if nn.Module.__call__ is _call:
        nn.Module.__call__ = _original_call  # type: ignore[method-assign]  # as it was
        _is_replaced = False
    if stateless._functional_call is _functional_call:
        stateless._functional_call = _original_functional_call


class Owners:
    """Looks for the owners of the followed optimizers' trainable parameters.

    Args:
        found: called with each owner, those of its parameters that were looked for, and whether the call is being compiled
            into a graph; before the call goes on.
        guarded: calls a function so that its failure does not end the job.
    """

    def __init__(self, found: Found, guarded: Callable[..., None]) -> None:
        self._found = found
        self._guarded = guarded
        self._lock = threading.RLock()
        # Weakly, as are the parameters: an optimizer that is dropped before it steps is looked for no longer.
        self._new: list[weakref.ref[Optimizer]] = []
        # By number. A parameter that is gone may leave its number to one of a model that nobody trains, hence weakly.
        self._wanted: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._strangers: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def follow(self, optimizer: Optimizer) -> None:
        """Look for the owners of an optimizer's parameters; they are read when the next module is called."""
        with self._lock:
            self._new.append(weakref.ref(optimizer))
            self._strangers = weakref.WeakSet()
            if self not in _looking:
                _looking.append(self)
                if len(_looking) == 1:
                    _replace()

    def forget(self, optimizer: Optimizer) -> None:
        """Look no longer for the owners of parameters that were trained without a call of one."""
        with self._lock:
            self._read_new()
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self._wanted.pop(id(param), None)
            self._stop_when_done()

    def stop(self) -> None:
        """Leave torch as it was."""
        with self._lock:
            self._new.clear()
            self._wanted.clear()
            self._stop_when_done()

    def look(self, module: nn.Module, in_graph: bool = False) -> None:
        """Look at a module that is about to be called."""
        if module not in self._strangers:
            self._guarded(self._look, module, in_graph)

    def _look(self, module: nn.Module, in_graph: bool) -> None:
        with self._lock:
            self._read_new()
            own = [p for p in module.parameters() if id(p) in self._wanted]
            if not own:
                self._strangers.add(module)
                self._stop_when_done()
                return
            try:
                self._found(module, own, in_graph)
            finally:  # not before: another thread's call would then go on without waiting for what is done here
                for param in own:
                    self._wanted.pop(id(param), None)
                self._stop_when_done()

    def _read_new(self) -> None:
        """Look for the parameters of the optimizers that were followed since."""
        while self._new:
            optimizer = self._new.pop()()
            if optimizer is not None:
                for group in optimizer.param_groups:
                    self._wanted.update((id(p), p) for p in group["params"] if p.requires_grad)

    def _stop_when_done(self) -> None:
        if not self._new and not self._wanted and self in _looking:
            _looking.remove(self)
            if not _looking:
                _put_back()
