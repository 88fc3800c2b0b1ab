"""The compute dtype: seen in the first gradients, and bf16 supplied on request where the application does not provide it.

Seen: an fp32 parameter that is computed in bf16 (fp16) gets a gradient that was rounded to that format on its way, so that
the low 16 (13) bits of each element are zero. Products in fp32 and TF32 leave such zeros by chance alone.

Supplied: the outermost module that is called and owns trainable fp32 parameters of the job's optimizers runs under autocast.
It is found through ``torch.nn.Module.__call__``, which is wrapped until all those parameters have an owner. From then on the
module's own slot for a compiled call, which torch leaves out of copies and pickles, holds the call under autocast.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from precision_policy.estimate import parameters
from precision_policy.job.wrapping import wrap

NOBODY: Final = "no autocast or mixed precision"
"""What a model is called under where nobody supplies 16 bits."""

LEFT_ALONE: Final = "no autocast of the policy's, which leaves PEFT and quantized models alone"
"""What such a model is called under, in a job that trains others as well."""

_MATRICES: Final = 8  # looked at for each optimizer; a matrix that is used twice shows the sum of two gradients
_ELEMENTS: Final = 2048  # of each
_FEWEST: Final = 64  # non-zero elements that tell anything
_DISTINCT: Final = 32  # values among them: the gradients of a toy are often a few small integers, exact in any format


@dataclasses.dataclass(frozen=True)
class LowBits:
    """A sample of a gradient's elements.

    Attributes:
        nonzero: how many are not zero.
        zero_16: how many of these have zeros in their low 16 bits.
        zero_13: how many have zeros in their low 13 bits.
        distinct: how many different magnitudes there are.
    """

    nonzero: int
    zero_16: int
    zero_13: int
    distinct: int


def low_bits(gradient: torch.Tensor) -> torch.Tensor:
    """Count in an fp32 gradient what :class:`LowBits` holds, as four int64 on its device, without waiting for that."""
    flat = next(parameters.flat_views(gradient.detach()))
    bits = flat[:: max(1, flat.numel() // _ELEMENTS)].view(torch.int32) & 0x7FFFFFFF
    nonzero = bits != 0
    magnitudes = bits.sort().values
    return torch.stack(
        [
            nonzero.sum(),
            (nonzero & ((bits & 0xFFFF) == 0)).sum(),
            (nonzero & ((bits & 0x1FFF) == 0)).sum(),
            (magnitudes[1:] != magnitudes[:-1]).sum() + 1,
        ]
    )


def computed_in(samples: Iterable[LowBits]) -> str | None:
    """What matrices were computed in: "bf16", "fp16", "fp32", "bf16 in part", or None where they do not tell.

    "fp32" stands for TF32 too, which leaves no other trace. An embedding's gradient is a sum in fp32 also where all else is
    computed in bf16, so "in part" takes more matrices in fp32 than in bf16.
    """
    usable = [one for one in samples if one.nonzero >= _FEWEST and one.distinct >= _DISTINCT]
    if not usable:
        return None
    bf16 = sum(one.zero_16 / one.nonzero > 0.99 for one in usable)
    if bf16:
        fp32 = sum(one.zero_13 / one.nonzero < 0.01 for one in usable)
        return "bf16" if bf16 >= fp32 else "bf16 in part"
    share = max(one.zero_13 / one.nonzero for one in usable)
    if share > 0.99:
        return "fp16"
    return "fp32" if share < 0.01 else None


class Probe:
    """Looks once at the first gradients of a few matrices of one optimizer; what it sees stays on the device until read."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._seen: list[torch.Tensor] = []
        self._other: str | None = None
        self._handles: list[Any] = []
        some: list[torch.Tensor] = []
        for group in optimizer.param_groups[: 4 * _MATRICES]:
            some += group["params"][:: max(1, len(group["params"]) // (4 * _MATRICES))]
        matrices = [p for p in some if p.dim() > 1 and p.requires_grad and p.is_leaf and _is_plain(p)]
        for param in matrices[:: max(1, len(matrices) // _MATRICES)][:_MATRICES]:
            handles: list[Any] = []
            handles.append(param.register_hook(functools.partial(self._look, handles)))  # type: ignore[no-untyped-call]  # torch gives it no type
            self._handles += handles

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no type
    def _look(self, handles: list[Any], gradient: torch.Tensor) -> None:
        for handle in handles:
            handle.remove()
        try:
            if gradient.dtype is torch.float32 and gradient.layout is torch.strided and gradient.numel():
                self._seen.append(low_bits(gradient))
            elif gradient.dtype in (torch.bfloat16, torch.float16):
                self._other = "bf16" if gradient.dtype is torch.bfloat16 else "fp16"
        except Exception:  # a gradient that cannot be read tells nothing, and must not end the backward pass
            return

    def read(self) -> str | None:
        """What the matrices were computed in, or None; waits for the device once. No hook is left behind."""
        self.close()
        if self._other or not self._seen:
            return self._other
        device = self._seen[0].device
        rows: list[list[int]] = torch.stack([row for row in self._seen if row.device == device]).tolist()
        return computed_in(LowBits(*row) for row in rows)

    def close(self) -> None:
        """Remove the hooks that have not fired."""
        while self._handles:
            self._handles.pop().remove()


def fp32_or_tf32(computed: str | None, device: torch.device) -> str | None:
    """Tell fp32 from TF32 by torch's own switch, as the gradients cannot."""
    if computed != "fp32" or device.type != "cuda":
        return computed
    try:
        return "TF32" if torch.get_float32_matmul_precision() != "highest" else "fp32"
    except RuntimeError:  # torch 2.9 and later refuse to tell when both its old and its new switches were used
        return computed


def bf16_device(device: torch.device) -> str | None:
    """The name of a device that has matrix units for bf16; None for one that has none, a CPU included."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.get_device_capability(device) >= (8, 0) else None
    supported = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    return device.type if device.type != "cpu" and supported is not None and supported() else None


class Owners:
    """Finds the outermost modules that are called and own the followed parameters.

    Args:
        found: called with each such module and its followed parameters, before the module's call goes on.
        guarded: calls a function so that its failure does not end the job.
    """

    def __init__(self, found: Callable[[nn.Module, list[nn.Parameter]], None], guarded: Callable[..., None]) -> None:
        self._found = found
        self._guarded = guarded
        self._lock = threading.RLock()
        # By number, and weakly: a parameter that is gone may leave its number to one of a model that nobody trains.
        self._wanted: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._strangers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []

    def follow(self, params: Iterable[torch.Tensor]) -> None:
        """Look for the owners of these as well."""
        with self._lock:
            self._wanted.update((id(p), p) for p in params)
            self._strangers = weakref.WeakSet()
            if self._wanted and not self._undo:
                # A hook would be traced by torch.compile, which also warns about it.
                self._undo.append(wrap(nn.Module, "__call__", self._called))

    def forget(self, params: Iterable[torch.Tensor]) -> None:
        """Look for the owners of these no longer."""
        with self._lock:
            for p in params:
                self._wanted.pop(id(p), None)
            if not self._wanted:
                self.stop()

    def stop(self) -> None:
        """Leave ``torch.nn.Module`` as it was."""
        with self._lock:
            self._wanted.clear()
            while self._undo:
                self._undo.pop()()

    def _called(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Not while a graph is traced: an owner is called from outside of any.
        if self._wanted and not torch.compiler.is_dynamo_compiling() and module not in self._strangers:
            self._guarded(self._look, module)
        return original(module, *args, **kwargs)

    def _look(self, module: nn.Module) -> None:
        with self._lock:
            own = [p for p in module.parameters() if id(p) in self._wanted]
            if not own:
                self._strangers.add(module)
                return
            try:
                self._found(module, own)
            finally:  # not before: another thread's call would then go on without waiting for what is done here
                self.forget(own)


class Supply:
    """Runs modules under bf16 autocast, until it is stopped."""

    def __init__(self) -> None:
        self._slots: list[tuple[weakref.ref[nn.Module], _UnderAutocast]] = []
        self._undo: list[Callable[[], None]] = []

    def to(self, module: nn.Module, device_type: str) -> None:
        """Run this module under autocast from now on."""
        call = _UnderAutocast(module, module.__dict__.get("_compiled_call_impl"), device_type)
        # Not by setattr: torch.compile's wrapper would hand it on to the module inside, where it would be traced.
        module.__dict__["_compiled_call_impl"] = call
        self._slots.append((weakref.ref(module), call))
        if not self._undo:
            self._undo.append(wrap(nn.Module, "compile", self._compiled))

    def stop(self) -> None:
        """Leave the modules as they were."""
        while self._slots:
            reference, call = self._slots.pop()
            module = reference()
            if module is not None and module.__dict__.get("_compiled_call_impl") is call:
                module.__dict__["_compiled_call_impl"] = call.inner
                if call.inner is None:
                    del module.__dict__["_compiled_call_impl"]
        while self._undo:
            self._undo.pop()()

    @staticmethod
    def _compiled(original: Callable[..., None], module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """``module.compile()`` puts its result into the same slot: put autocast around that one too."""
        call = module.__dict__.get("_compiled_call_impl")
        original(module, *args, **kwargs)
        if isinstance(call, _UnderAutocast):
            call.inner = module.__dict__["_compiled_call_impl"]
            module.__dict__["_compiled_call_impl"] = call


class _UnderAutocast:
    """A module's call under bf16 autocast, whose bf16 outputs come back in fp32. Copies and pickles hold None in its place.

    Args:
        module: the module.
        inner: its compiled call, or None for its plain one.
        device_type: the device of its parameters.
    """

    def __init__(self, module: nn.Module, inner: Callable[..., Any] | None, device_type: str) -> None:
        self._module = weakref.ref(module)  # not the module itself: a cycle would keep its memory until it is collected
        self.inner = inner
        self._device_type = device_type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.inner
        if call is None:
            module = self._module()
            assert module is not None  # it is being called
            call = module._call_impl  # what torch itself calls where the slot is empty
        if torch.is_autocast_enabled(self._device_type):
            return call(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch gives it none
        with torch.autocast(self._device_type, dtype=torch.bfloat16):
            output = call(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch gives it none
        return in_fp32(output)

    def __reduce__(self) -> Any:
        return type(None), ()


def with_what_it_wraps(module: nn.Module) -> Iterator[nn.Module]:
    """The module and, below DDP, DataParallel or torch.compile's wrapper, the model itself: ``generate`` calls that one."""
    yield module
    is_parallel = isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    inner = module.module if is_parallel else getattr(module, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        yield from with_what_it_wraps(inner)


def in_fp32(output: Any) -> Any:
    """The output with its bf16 tensors in fp32, in lists, tuples, mappings and dataclasses of any depth."""
    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype is torch.bfloat16 else output
    if isinstance(output, Mapping):
        return _rebuilt(output, {key: in_fp32(value) for key, value in output.items()})
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(in_fp32, output))
    if type(output) in (list, tuple):
        changed = [in_fp32(value) for value in output]
        return type(output)(changed) if any(old is not new for old, new in zip(output, changed, strict=True)) else output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {one.name: getattr(output, one.name) for one in dataclasses.fields(output) if one.init}
        new = {name: in_fp32(value) for name, value in fields.items()}
        return dataclasses.replace(output, **new) if _differ(fields, new) else output
    return output


def _rebuilt(output: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    if not _differ(output, changed):
        return output
    return type(output)(**changed) if dataclasses.is_dataclass(output) else type(output)(changed)  # type: ignore[call-arg]


def _differ(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> bool:
    return any(before[key] is not value for key, value in after.items())


def supplier(module: nn.Module, device_type: str) -> tuple[str, str | None] | None:
    """Who provides the module's compute dtype already, and what that is where it says so; None when nobody does."""
    for one in module.modules():
        dtype = _fsdp_dtype(one)
        if dtype is not None:
            return "FSDP's mixed precision", dtype
    if torch.is_autocast_enabled(device_type):
        return "the application's autocast", None
    if hasattr(module, "_original_forward"):  # accelerate's mark on a forward that it has put under autocast
        return "accelerate's mixed precision", None
    return None


def _fsdp_dtype(module: nn.Module) -> str | None:
    """The compute dtype of FSDP's own policy at this module; None without any."""
    state = getattr(module, "_get_fsdp_state", None)
    if callable(state):
        policy = getattr(state(), "_mp_policy", None)
    elif "FullyShardedDataParallel" in {kind.__name__ for kind in type(module).__mro__}:
        policy = getattr(module, "mixed_precision", None)
    else:
        return None
    dtype = getattr(policy, "param_dtype", None)
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype) if isinstance(dtype, torch.dtype) else None


def is_sharded(params: Sequence[torch.Tensor]) -> bool:
    """Whether some are shards, whose gradients are sums over ranks and tell nothing."""
    return any(parameters.is_shard(p) or not _is_plain(p) for p in params)


def _is_plain(param: torch.Tensor) -> bool:
    return type(param) in (nn.Parameter, torch.Tensor) and not hasattr(param, "_local_tensor")
