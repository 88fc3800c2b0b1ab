"""bf16 autocast around a model's ``forward``, as accelerate puts it: hooks of the application and the caller see fp32.

A module's own slot for a compiled call holds the call under autocast. torch looks into that slot at each call, and leaves it
out of copies and pickles, which thus have nothing of the policy and compute with their own weights.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from precision_policy.estimate import parameters
from precision_policy.job.owners import is_exporting, note_old_exports
from precision_policy.job.wrapping import wrap

_SLOT: Final = "_compiled_call_impl"

# torch.compile traces the call of a weak reference: 2.13 does, 2.4 raises an error.
_TRACES_WEAKREFS: Final = hasattr(torch._dynamo.variables, "WeakRefVariable")

# Around torch.jit.trace's own check, which compares what was traced with another call of the module.
_CHECKS = threading.local()


class Call:
    """A module's call: noted, and under bf16 autocast if it is to be supplied. Copies and pickles hold None in its place.

    Args:
        module: the module.
        inner: its compiled call, or None for its plain one.
        device_type: the device of its parameters.
        supplies: whether to supply autocast where the caller has not entered one.
        notes: whether to note under what it is called. A call from inside of another one under the policy's autocast would
            take that for the application's.

    Attributes:
        saw_autocast: whether a call was under an autocast of the application's.
        has_supplied: whether a call was not, and so was put under the policy's.
    """

    def __init__(
        self, module: nn.Module, inner: Callable[..., Any] | None, device_type: str, supplies: bool, notes: bool
    ) -> None:
        # Not the module itself: a cycle would keep its memory until it is collected.
        self._module: Callable[[], nn.Module | None] = (
            weakref.ref(module) if _TRACES_WEAKREFS else functools.partial(_same, module)
        )
        self.inner = inner
        self.supplies = supplies
        self.notes = notes
        self.saw_autocast = False
        self.has_supplied = False
        self._device_type = device_type
        self._lock = threading.Lock()
        self._calls_inside_hooks = 0
        self._replaced_forward: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        call = self.inner
        module = self._module()
        assert module is not None  # it is being called
        if call is None:
            call = module._call_impl  # what torch itself calls where the slot is empty
        if torch.compiler.is_compiling():
            return self._in_graph(call, args, kwargs)
        if torch._C._get_tracing_state() is not None or getattr(_CHECKS, "now", False):
            return call(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch gives it none
        is_under_autocast = torch.is_autocast_enabled(self._device_type)
        if self.notes:
            self.saw_autocast |= is_under_autocast
            self.has_supplied |= self.supplies and not is_under_autocast
        if is_under_autocast or not self.supplies:
            return call(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch gives it none
        if self.inner is None and _has_hooks(module):
            return self._inside_hooks(module, args, kwargs)
        return under_autocast(self._device_type, call, args, kwargs)

    def _in_graph(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Nothing is noted here: what is traced would become a part of the graph, or the graph depend on it."""
        if is_exporting() or torch.is_autocast_enabled(self._device_type) or not self.supplies:
            return call(*args, **kwargs)
        return under_autocast(self._device_type, call, args, kwargs)

    def _inside_hooks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let torch run the module's hooks, around a ``forward`` that is under autocast for the time of this call.

        torch reads ``forward`` from the module when its call begins. It is put there only then, since copies would keep it.
        """
        with self._lock:
            self._calls_inside_hooks += 1
            if self._calls_inside_hooks == 1:
                self._replaced_forward = module.__dict__.get("forward")
                module.__dict__["forward"] = _Forward(module.forward, self._device_type)
        try:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch gives it none
        finally:
            with self._lock:
                self._calls_inside_hooks -= 1
                # A forward that was replaced meanwhile, as Lightning replaces it, stays.
                if self._calls_inside_hooks == 0 and isinstance(module.__dict__.get("forward"), _Forward):
                    _put_back(module, "forward", self._replaced_forward)

    def __reduce__(self) -> Any:
        return type(None), ()


def _same(module: nn.Module) -> nn.Module:
    return module


class _Forward:
    """A module's ``forward`` under autocast; a copy that is made during the call gets the copied module's own one."""

    def __init__(self, forward: Callable[..., Any], device_type: str) -> None:
        self.__wrapped__ = forward  # whoever asks for the signature gets that of this one
        self._device_type = device_type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled(self._device_type):  # forward that calls itself
            return self.__wrapped__(*args, **kwargs)
        return under_autocast(self._device_type, self.__wrapped__, args, kwargs)

    def __reduce__(self) -> Any:
        return functools.partial, (self.__wrapped__,)


def under_autocast(device_type: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call something under bf16 autocast; its bf16 outputs come back in fp32.

    Without autocast's cache: that lives as long as the outermost autocast, which may be a whole training step with several
    steps of an optimizer in it, and would hand out the weights of the first. Lightning does the same.
    """
    if torch.compiler.is_compiling():
        with torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False):
            output = call(*args, **kwargs)
        return in_fp32(output)
    # To make an autocast takes longer than to enter one, so those that are not entered now are used again.
    idle = _idle_autocasts.of_device_type.setdefault(device_type, [])
    autocast = idle.pop() if idle else torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False)
    try:
        with autocast:
            output = call(*args, **kwargs)
    finally:
        idle.append(autocast)
    return in_fp32(output)


class _IdleAutocasts(threading.local):
    """The autocasts of a thread that nothing is under."""

    def __init__(self) -> None:
        self.of_device_type: dict[str, list[torch.autocast]] = {}


_idle_autocasts = _IdleAutocasts()


def in_fp32(output: Any) -> Any:
    """The output with its bf16 tensors in fp32, also those in containers that torch's pytree knows.

    Anything else stays the same object, as does a container without a bf16 tensor: to make an object anew, one has to know
    how it is made.
    """
    if isinstance(output, torch.Tensor):
        return _widened(output)
    if _has_nothing_to_widen(output):
        return output
    leaves = pytree.tree_leaves(output, is_leaf=_may_have_a_constructor)
    widened = [_widened(leaf) for leaf in leaves]
    if all(old is new for old, new in zip(leaves, widened, strict=True)):
        return output
    structure = pytree.tree_structure(output, is_leaf=_may_have_a_constructor)  # only now: it costs as much as autocast
    return pytree.tree_unflatten(widened, structure)


def _has_nothing_to_widen(output: Any) -> bool:
    """Whether that is seen at once: no bf16 tensor, and nothing that may hold one. pytree takes as long as autocast to tell."""
    if isinstance(output, dict):
        values: Any = output.values()
    elif isinstance(output, (tuple, list)):
        values = output
    else:
        return False
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.dtype is torch.bfloat16:
                return False
        elif value is not None and not isinstance(value, (int, float, str)):
            return False
    return True


def _may_have_a_constructor(node: Any) -> bool:
    """Whether it is a tuple of a class that derives from a named one: pytree would call that class with the fields."""
    return isinstance(node, tuple) and hasattr(node, "_fields") and tuple not in type(node).__bases__


def _widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.dtype is torch.bfloat16 else leaf


class Autocast:
    """Puts calls into modules' slots, until it is stopped."""

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[nn.Module, Call] = weakref.WeakKeyDictionary()
        self._undo: list[Callable[[], None]] = []

    def supply(self, module: nn.Module, device_type: str) -> Call:
        """Run a module that the application calls under autocast from now on; a second time changes nothing.

        Returns:
            The call that notes under what the module is called.
        """
        first, *others = _models_in(module)
        for other in others:
            self._put(other, device_type, supplies=True, notes=False)
        return self._put(first, device_type, supplies=True, notes=True)

    def note(self, module: nn.Module, device_type: str) -> Call:
        """Note under what a module is called from now on, and supply nothing."""
        return self._put(next(_models_in(module)), device_type, supplies=False, notes=True)

    def take_away(self, call: Call) -> None:
        """Leave the module as it was; for a call that supplies nothing."""
        call.notes = False
        for module, present in list(self._calls.items()):
            if present is call:
                del self._calls[module]
                _leave(module, call)

    def stop(self) -> None:
        """Leave the modules and torch as they were."""
        for module, call in list(self._calls.items()):
            _leave(module, call)
        self._calls.clear()
        while self._undo:
            self._undo.pop()()

    def _put(self, module: nn.Module, device_type: str, supplies: bool, notes: bool) -> Call:
        for inside in module.modules():
            if inside is not module and inside in self._calls:
                self._calls[inside].notes = False
        present = module.__dict__.get(_SLOT)
        if isinstance(present, Call):
            present.supplies |= supplies
            if supplies:
                self._make_visible(type(module))
            return present
        call = self._calls[module] = Call(module, present, device_type, supplies, notes)
        # Not by setattr: torch.compile's wrapper would hand it on to the module inside, where it would be traced.
        module.__dict__[_SLOT] = call
        if not self._undo:
            self._undo.append(wrap(nn.Module, "compile", _compile))
            self._undo.append(wrap(nn.Module, "_replicate_for_data_parallel", _replicate))
            self._undo.append(wrap(torch.jit._trace, "_check_trace", _check_trace))
            self._undo.append(note_old_exports())
        if supplies:
            self._make_visible(type(module))
        return call

    def _make_visible(self, kind: type[nn.Module]) -> None:
        """Let torch.compile see the slots of a class's modules, in functions that call them.

        Where a class has torch's own ``__call__``, it traces ``forward`` at once.
        """
        if kind.__call__ is nn.Module.__call__:
            kind.__call__ = _call_as_ever  # type: ignore[method-assign]  # taken away in the end
            self._undo.append(functools.partial(_take_call_away, kind))


def _call_as_ever(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return nn.Module.__call__(module, *args, **kwargs)


def _take_call_away(kind: type[nn.Module]) -> None:
    if kind.__dict__.get("__call__") is _call_as_ever:
        del kind.__call__


def _compile(original: Callable[..., None], module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """``module.compile()`` puts its result into the same slot: put the call around that one too."""
    call = module.__dict__.get(_SLOT)
    original(module, *args, **kwargs)
    if isinstance(call, Call):
        call.inner = module.__dict__[_SLOT]
        module.__dict__[_SLOT] = call


def _replicate(original: Callable[..., Any], module: nn.Module) -> Any:
    """A replica of ``nn.DataParallel`` shares its slot with the module, whose weights are on another device: call its own."""
    replica = original(module)
    if isinstance(replica.__dict__.get(_SLOT), Call):
        del replica.__dict__[_SLOT]
    return replica


def _check_trace(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _CHECKS.now = True
    try:
        return original(*args, **kwargs)
    finally:
        _CHECKS.now = False


def _leave(module: nn.Module, call: Call) -> None:
    if module.__dict__.get(_SLOT) is call:
        _put_back(module, _SLOT, call.inner)


def _put_back(module: nn.Module, name: str, before: Any) -> None:
    """Set an attribute of the instance to what it was; None where it had none."""
    if before is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before


def _has_hooks(module: nn.Module) -> bool:
    """Whether torch runs hooks around the module's ``forward``."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return True
    everybodys = nn.modules.module
    return bool(everybodys._global_forward_pre_hooks or everybodys._global_forward_hooks)


def _models_in(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose calls are the model's, the outermost first.

    DDP has no arithmetic of its own, and hooks of the application are on the model inside. ``generate`` calls what is inside
    of torch.compile's wrapper, which others call.
    """
    while isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)) and not _calls_replicas(module):
        module = module.module
    yield module
    inner = module._modules.get("_orig_mod")
    if inner is not None:
        yield from _models_in(inner)


def _calls_replicas(module: nn.Module) -> bool:
    return isinstance(module, nn.DataParallel) and len(module.device_ids) > 1


@dataclass(frozen=True)
class Obstacle:
    """Why bf16 autocast is not supplied.

    Attributes:
        why: a clause.
        fix: what helps, or empty.
    """

    why: str
    fix: str


def find_obstacle(module: nn.Module, device_type: str) -> Obstacle | None:
    """What speaks against autocast around a module on such a device; None where nothing does."""
    if any(map(_calls_replicas, module.modules())):
        return Obstacle(
            "nn.DataParallel calls copies of the model, in threads that have an autocast of their own",
            "one process for each GPU, with torch.nn.parallel.DistributedDataParallel",
        )
    try:
        torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False)
    except RuntimeError as error:
        return Obstacle(f"torch says: {error}", "")
    return None


@dataclass(frozen=True)
class Precision:
    """The mixed precision that a model brings along.

    Attributes:
        name: how it is called.
        dtype: what all parameters are computed in, "bf16" or "fp16"; None where that is not known.
        obstacle: set where it asks for more than 16 bits.
    """

    name: str
    dtype: str | None
    obstacle: Obstacle | None = None


def own_precision(module: nn.Module) -> Precision | None:
    """The mixed precision of a module, or of parts of it; None without any."""
    found: dict[str, Precision] = {}
    covered: set[int] = set()
    for part in module.modules():
        precision = _precision_of(part)
        if precision is not None:
            found[precision.name] = precision
            covered.update(id(p) for p in part.parameters())
    if not found:
        return None
    names = " and ".join(found)
    if any(id(p) not in covered for p in module.parameters()):
        return Precision(f"{names} in parts of it", None)
    return next(iter(found.values())) if len(found) == 1 else Precision(names, None)


def _precision_of(module: nn.Module) -> Precision | None:
    """The mixed precision of this very module."""
    if "_original_forward" in module.__dict__:  # accelerate's mark on a forward that it has put under autocast
        return Precision("accelerate's mixed precision", None)
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if "_FabricModule" in kinds:
        setting = module._strategy.precision.precision  # type: ignore[union-attr]  # Fabric's wrapper has it
        name = str(setting)
        if name.endswith("-true"):
            return None
        return Precision(f"Fabric's {name}", {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(name))
    dtype = _dtype_of_policy(module, kinds)
    if dtype is None:
        return None
    owner = "DDP" if "DistributedDataParallel" in kinds else "FSDP"
    name = parameters.short_name(dtype)
    if dtype in (torch.bfloat16, torch.float16):
        return Precision(f"{owner}'s mixed precision", name)
    named = f"{owner}'s mixed precision, which names {name}"
    return Precision(named, None, Obstacle(f"the model is under {named}", "name torch.bfloat16 there, as param_dtype"))


def _dtype_of_policy(module: nn.Module, kinds: set[str]) -> torch.dtype | None:
    """The compute dtype that DDP's or FSDP's own policy at this module names; None without any."""
    read_state = getattr(type(module), "_get_fsdp_state", None)
    if read_state is not None:
        policy = getattr(read_state(module), "_mp_policy", None)
    elif kinds & {"FullyShardedDataParallel", "DistributedDataParallel"}:
        policy = getattr(module, "mixed_precision", None)
    else:
        return None
    return getattr(policy, "param_dtype", None)
