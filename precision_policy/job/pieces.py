"""bf16 parameters as fp32 ones, a piece at a time: what stands in an optimizer for the time of its step.

A piece is some parameters, or a part of a large one. For its step the optimizer sees fp32 leaves with fp32 gradients. The
leaves of all pieces lie in the same memory, so fp32 copies exist for one piece at a time.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch

from precision_policy.estimate import parameters
from precision_policy.job import low_bits

# The names under which a state holds what a master weight needs beside the weight in the model.
LOW_BITS: Final = "master_low_bits"
WHOLE: Final = "master_param"

# How many elements are stepped together. On a CPU they stay in its cache; on a GPU a launch must be worth its while.
_MOST_ON_CPU: Final = 2**20
_MOST_ON_GPU: Final = 2**26
# Members of this mean size are worth a copy of their states, if torch then steps all of them as one tensor.
_SMALL: Final = 2**14
# On a GPU leaves begin at multiples of so many elements: kernels read several at once where these are aligned.
_ALIGNMENT: Final = 16


def kernels_on(device: torch.device) -> Any:
    """The module of Triton kernels, where they run on this device; None where torch's operations do their work."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # what is captured must not copy from the host, as a kernel's table of addresses is
    try:
        from precision_policy.job import kernels
    except ImportError:  # no Triton here
        return None
    return kernels if kernels.can_run(device) else None


class Scratch:
    """The memory in which pieces are stepped, one after the other: ``size`` elements of each."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        self.weights = self._make(torch.float32)
        self.grads = self._make(torch.float32)

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """Rounded weights on their way to several parameters."""
        return self._make(torch.bfloat16)

    @functools.cached_property
    def lows(self) -> torch.Tensor:
        """Low bits on their way from and to several states."""
        return self._make(_dtype_of_low_bits(self.device))

    @functools.cached_property
    def flat_state(self) -> torch.Tensor:
        """The one state of parameters that are stepped as one tensor."""
        return self._make(torch.float32)

    def _make(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.size, dtype=dtype, device=self.device)


class Member:
    """A bf16 parameter that is stepped in fp32.

    Args:
        param: the application's.
        group: the number of its parameter group.

    Attributes:
        times: how often it stands in the group. torch warns of more than once, and updates it as often.
        row: what the step of all of Adam in one kernel keeps of it, for that step's own use.
        keeps_whole: whether its state holds a whole fp32 copy. FSDP1 with ``use_orig_params`` wants one dtype in a state.
        is_shard: whether it is a DTensor, of which this rank has a part.
        shape, size, device: of this rank's part.
        is_dense: whether that part fills a stretch of memory.
        stride: the stride of its leaf and of all its states: its own where it is dense.
    """

    def __init__(self, param: torch.Tensor, group: int) -> None:
        self.param = param
        self.group = group
        self.times = 1
        self.row: Any = None
        self.keeps_whole = parameters.has_unknown_size(param)
        value = self.value
        self.is_shard = value is not param
        self.shape = value.shape
        self.size = value.numel()
        self.device = value.device
        self.is_dense = is_dense(value)
        self._own_stride = value.stride()
        self.is_contiguous = value.is_contiguous()
        self.stride = self._own_stride if self.is_dense else _contiguous_stride(value.shape)

    @property
    def value(self) -> torch.Tensor:
        """This rank's part of the parameter. A DTensor may get another one between steps."""
        return parameters.local(self.param)

    def fits(self, param: torch.Tensor, group: int) -> bool:
        """Whether this still describes a parameter: what was made for it can be used again."""
        if self.param is not param or self.group != group or param.dtype is not torch.bfloat16:
            return False
        value = parameters.local(param) if self.is_shard else param
        if value.shape != self.shape or value.device != self.device:
            return False
        return (self.is_contiguous and value.is_contiguous()) or value.stride() == self._own_stride

    def lay(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same elements in this dtype, on the parameter's device, in the leaf's strides; a copy only where need be."""
        if tensor.dtype is dtype and tensor.stride() == self.stride and tensor.device == self.device:
            return tensor
        return self.new(dtype).copy_(tensor)

    def new(self, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor like the leaf."""
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=self.device)

    def wrap(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor as the application sees such tensors: a DTensor where the parameter is one."""
        if not self.is_shard:
            return tensor
        kind: Any = type(self.param)
        param: Any = self.param
        wrapped: torch.Tensor = kind.from_local(
            tensor, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
        return wrapped


class Piece:
    """Members that are stepped together, or a part of a single one.

    Args:
        members: in the order in which the optimizer shall see them.
        scratch: at least as large as they are.
        part: the elements of the one member, in the order of its memory; None for all of it.
        wraps: whether the optimizer shall see a DTensor's leaf as a DTensor, because it does not work element by element.
    """

    def __init__(self, members: list[Member], scratch: Scratch, part: slice | None = None, wraps: bool = False) -> None:
        self.members = members
        self.part = part
        self._params = [member.param for member in members]
        self._has_shards = any(member.is_shard for member in members)
        # Whether each leaf's state is this rank's parameter's, and nothing needs to be made of it.
        self.is_plain = not self._has_shards and not any(member.keeps_whole for member in members)
        self._shapes = [member.shape for member in members]
        self._strides = [member.stride for member in members]
        self._are_contiguous = all(member.is_contiguous for member in members)
        offsets = []
        self.size = 0
        for member in members:
            offsets.append(self.size)
            self.size += _room_of(member) if part is None else part.stop - part.start
        self._scratch = scratch
        self._weights = scratch.weights[: self.size]
        self._room = scratch.grads[: self.size]
        # One dense tensor is read and written where it is. Several go through the scratch, as one tensor there.
        only = members[0]
        self._is_flat = len(members) == 1 and only.is_dense and not only.keeps_whole
        if self._is_flat:
            count = only.size if part is None else part.stop - part.start
            self._weights, self._room = self._weights[:count], self._room[:count]
        can_use_kernels = all(member.is_dense and not member.keeps_whole for member in members)
        self._kernels = kernels_on(only.device) if can_use_kernels else None
        self._split: Callable[[], None] | None = None
        # The low bits that the leaves were joined with: the kernels are then ready to split into the same.
        self._joined: list[torch.Tensor] = []
        self._offsets = offsets
        # Whether torch steps the members sooner as one tensor, copies of their states counted in.
        self.are_small = len(members) > 1 and self.size <= _SMALL * len(members)
        self.views = self._views_of(scratch.weights, offsets)
        self._grads = self._views_of(scratch.grads, offsets)
        if not self._is_flat and self._kernels is None:
            self._values = self._views_of(scratch.values, offsets)
            self._lows = self._views_of(scratch.lows, offsets)
        self.leaves = self.views
        grads = self._grads
        if wraps:
            self.leaves = [member.wrap(view) for member, view in zip(members, self.views, strict=True)]
            grads = [member.wrap(grad) for member, grad in zip(members, grads, strict=True)]
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad

    def _views_of(self, flat: torch.Tensor, offsets: list[int]) -> list[torch.Tensor]:
        if self.part is not None:
            return [flat[: self.part.stop - self.part.start]]
        return [
            flat.as_strided(member.shape, member.stride, offset) for member, offset in zip(self.members, offsets, strict=True)
        ]

    def leaves_by_group(self) -> dict[int, list[torch.Tensor]]:
        """The leaves as they stand in the parameter groups."""
        found: dict[int, list[torch.Tensor]] = {}
        for member, leaf in zip(self.members, self.leaves, strict=True):
            if member.group not in found:
                found[member.group] = []
            found[member.group] += [leaf] * member.times
        return found

    @functools.cached_property
    def spans_by_group(self) -> dict[int, slice]:
        """Where the members of each parameter group lie in the scratch; between two of them may lie elements of none."""
        ends = [*self._offsets[1:], self.size]
        spans: dict[int, slice] = {}
        for member, start, end in zip(self.members, self._offsets, ends, strict=True):
            first = spans[member.group].start if member.group in spans else start
            spans[member.group] = slice(first, end)
        return spans

    def flat_leaf(self, span: slice) -> torch.Tensor:
        """The leaves there as one, with its gradient."""
        leaf = self._scratch.weights[span]
        leaf.grad = self._scratch.grads[span]
        return leaf

    def flat_state(self, span: slice) -> torch.Tensor:
        """The one state of a flat leaf."""
        return self._scratch.flat_state[span]

    @functools.cached_property
    def state_views(self) -> list[torch.Tensor]:
        """Each member's part of :meth:`flat_state`."""
        return self._views_of(self._scratch.flat_state, self._offsets)

    def has_layout(self, tensors: Sequence[torch.Tensor | None], dtype: torch.dtype) -> bool:
        """Whether there is a tensor for each member, that lies in memory as its leaf does."""
        if any(tensor is None for tensor in tensors):
            return False
        present: Any = tensors
        if {tensor.dtype for tensor in present} != {dtype} or {tensor.device for tensor in present} != {self._scratch.device}:
            return False
        # Not a list of shapes: so many new tuples at once set off Python's garbage collection, which takes as long as the step.
        if not all(map(operator.eq, (tensor.shape for tensor in present), self._shapes)):
            return False
        if self._are_contiguous:  # this tells in a third of the time
            return all(tensor.is_contiguous() for tensor in present)
        return [tensor.stride() for tensor in present] == self._strides

    def _present_values(self) -> list[torch.Tensor]:
        return [member.value for member in self.members] if self._has_shards else self._params

    def of_all(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What the kernels read and write of dense tensors, which they take by address and size alone."""
        return tensors if self.part is None else [self.of(tensor) for tensor in tensors]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece's part of a dense tensor that is laid as its one member is, in the order of its memory."""
        if self.part is None:
            return _flat(tensor)
        count = self.part.stop - self.part.start
        return tensor.as_strided((count,), (1,), tensor.storage_offset() + self.part.start)

    def join(self, lows: Sequence[torch.Tensor | None]) -> None:
        """Make the weights of the leaves: from the values in the model, and the low bits of each, where there are any."""
        values = self._present_values()
        self._joined = []
        present = [low for low in lows if low is not None]
        if self._kernels is not None and len(present) == len(lows):
            prepared = self._kernels.prepare(self.of_all(values), self.of_all(present), self.views)
            prepared.join()
            self._joined, self._split = present, prepared.split
            return
        if self._is_flat:
            self._weights.copy_(self.of(values[0]))
            if lows[0] is not None:
                low_bits.join(self._weights, self.of(lows[0]), self._room)
            return
        torch._foreach_copy_(self.views, values)
        if self._kernels is not None:
            for view, low in zip(self.views, lows, strict=True):
                if low is not None:
                    low_bits.join(_flat(view), _flat(low), torch.empty_like(_flat(view)))
            return
        if not present:
            return
        views = self._lows
        if len(present) < len(lows):
            self._scratch.lows[: self.size].zero_()
            views = [view for view, low in zip(views, lows, strict=True) if low is not None]
        torch._foreach_copy_(views, [_alike(low, view) for low, view in zip(present, views, strict=True)])
        low_bits.join(self._weights, self._scratch.lows[: self.size], self._room)

    def take_grads(self) -> None:
        """Give the leaves the parameters' gradients, in fp32."""
        grads: list[Any] = [member.param.grad for member in self.members]
        if self._has_shards:
            grads = [grad_of(member) for member in self.members]
        if self.part is not None:
            grads = [self.of(self.members[0].lay(grads[0], grads[0].dtype))]
        torch._foreach_copy_(self._grads, grads)

    def prepare_write(self, kept: Sequence[torch.Tensor]) -> None:
        """Get the memory that writing needs, before anything is written."""
        if self._kernels is None:
            return
        is_as_joined = len(kept) == len(self._joined) and all(map(operator.is_, kept, self._joined))
        self._joined = []
        if not is_as_joined:
            values = self.of_all(self._present_values())
            self._split = self._kernels.prepare(values, self.of_all(kept), self.views).split

    def round_off(self) -> None:
        """Make ready what :meth:`write` writes; it can be done again. The gradients are lost."""
        if self._split is not None:
            return
        low_bits.round_off(self._weights, self._room)
        if not self._is_flat:
            values, lows = self._scratch.values[: self.size], self._scratch.lows[: self.size]
            low_bits.write(self._weights, self._room, values, lows)

    def write(self, kept: Sequence[torch.Tensor]) -> None:
        """Write the rounded weights into the parameters, and what is kept of each into its place; it can be done again."""
        values = self._present_values()
        if self._split is not None:
            self._split()
            note_writes(values)
            return
        if self._is_flat:
            low_bits.write(self._weights, self._room, self.of(values[0]), self.of(kept[0]))
            return
        torch._foreach_copy_(values, self._values)
        targets = []
        sources = []
        for member, own, view, low in zip(self.members, kept, self.views, self._lows, strict=True):
            targets.append(own if member.keeps_whole else _alike(own, low))
            sources.append(view if member.keeps_whole else low)
        torch._foreach_copy_(targets, sources)


def cut(members: Sequence[Member], scratch: Scratch, elementwise: bool) -> Iterator[list[Piece]]:
    """The pieces of members of one device: lists of one piece, or of all that one large member is cut into."""
    together: list[Member] = []
    size = 0
    for member in members:
        if together and size + _room_of(member) > scratch.size:
            yield [Piece(together, scratch, wraps=not elementwise)]
            together, size = [], 0
        if member.size <= scratch.size:
            together.append(member)
            size += _room_of(member)
        elif elementwise and member.is_dense and not member.keeps_whole:
            starts = range(0, member.size, scratch.size)
            parts = [slice(start, min(start + scratch.size, member.size)) for start in starts]
            yield [Piece([member], scratch, part) for part in parts]
        else:
            large = Scratch(_room_of(member), scratch.device)
            yield [Piece([member], large, wraps=not elementwise)]
    if together:
        yield [Piece(together, scratch, wraps=not elementwise)]


def scratch_for(members: Iterable[Member], device: torch.device) -> Scratch:
    """The memory in which members are stepped: no more than they need, and no more than is good."""
    return Scratch(min(_MOST_ON_GPU, elements_of(members)), device)


def scratch_on_cpu() -> Scratch:
    """The memory for any members on a CPU. It is worth keeping: to get memory anew takes a CPU as long as to step in it."""
    return Scratch(_MOST_ON_CPU, torch.device("cpu"))


def elements_of(members: Iterable[Member]) -> int:
    """How many elements members take in a scratch."""
    return sum(_room_of(member) for member in members)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each in a place of its own, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _dtype_of_low_bits(device: torch.device) -> torch.dtype:
    """The dtype in which low bits are copied together.

    Integers, but on a CPU: a foreach copy of bf16 on CUDA goes through fp32, which makes one NaN of all NaN, and so other low
    bits. On a CPU a copy keeps them, and a view of each tensor would take longer than to copy it.
    """
    return torch.bfloat16 if device.type == "cpu" else torch.int16


def _alike(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The same bits, in the dtype of another tensor."""
    return tensor if tensor.dtype is other.dtype else tensor.view(other.dtype)


def note_writes(tensors: list[torch.Tensor]) -> None:
    """Tell autograd that a kernel has written tensors, as it would hear of an operation of torch's."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # before torch 2.5 it took one tensor
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def _room_of(member: Member) -> int:
    """How many elements a member takes in a scratch."""
    if member.device.type == "cpu":
        return member.size
    return -(-member.size // _ALIGNMENT) * _ALIGNMENT


def grad_of(member: Member) -> torch.Tensor:
    """This rank's part of a gradient, sharded as the parameter is."""
    grad: Any = member.param.grad
    param: Any = member.param
    if hasattr(grad, "placements") and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return parameters.local(grad)
