"""Triton kernels for bf16 weights whose 16 low bits are kept beside them: join, split, and all of Adam's step in one.

Each call takes lists of tensors and launches one kernel for all of them. A kernel finds its tensor in a table of addresses, as
torch's own fused optimizers do, so that ten thousand small tensors cost one launch too. All tensors of one row have the same
strides and no gaps, so an element has the same place in each of them.

What the bits mean stands in :mod:`precision_policy.job.low_bits`; both ways give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

# Elements that one program works on, and its warps: four elements to a thread, read 8 or 16 bytes at once.
_BLOCK: Final = 2**10
_WARPS: Final = 8
_ALIGNMENT: Final = 16  # bytes that one thread reads at once


@functools.cache
def can_run(device: torch.device) -> bool:
    """Whether the kernels run on this device: one is tried. Triton needs a C compiler, which many containers lack."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not is_interpreted:
        return False
    try:
        value = torch.zeros(1, dtype=torch.bfloat16, device=device)
        split([torch.ones(1, device=device)], [value], [torch.zeros_like(value)])
    except Exception:  # whatever keeps Triton from its work here, torch operations do it as well
        return False
    return value.item() == 1.0


def join(values: Sequence[torch.Tensor], lows: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
    """Make fp32 weights of bf16 values and their low bits.

    Args:
        values: bf16.
        lows: the low bits, int16 viewed as bf16, with the strides of the values.
        weights: fp32, with the same strides; overwritten.
    """
    prepare(values, lows, weights).join()


def split(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor], lows: Sequence[torch.Tensor]) -> None:
    """Write fp32 weights into bf16 values, rounded to nearest with ties away from zero, and their low bits.

    Args:
        weights: fp32.
        values: bf16, with the same strides; overwritten.
        lows: the low bits, as in :func:`join`; overwritten.
    """
    prepare(values, lows, weights).split()


class Prepared(NamedTuple):
    """What :func:`join` and :func:`split` do with some tensors, made ready: it needs no memory, and can be repeated."""

    join: Callable[[], None]
    split: Callable[[], None]


def prepare(values: Sequence[torch.Tensor], lows: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> Prepared:
    """Make all that :func:`join` and :func:`split` need memory for, once for both."""
    launch, table = _prepare([values, lows, weights])
    return Prepared(functools.partial(launch, _join, table), functools.partial(launch, _split, table))


def adam(
    values: Sequence[torch.Tensor],
    lows: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    count: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    fused: bool,
) -> None:
    """Make the step of ``torch.optim.Adam`` or ``AdamW`` on the fp32 weights that values and low bits stand for.

    26 bytes an element are moved: 16 of the two states, 4 of the values, 4 of the low bits, 2 of the gradient. The arithmetic
    is that of torch's fused kernel (``ATen/native/cuda/fused_adam_utils.cuh``).

    Args:
        values: bf16 weights of one device; overwritten.
        lows: their low bits, as in :func:`join`; overwritten.
        gradients: bf16.
        exp_avgs: fp32; overwritten.
        exp_avg_sqs: fp32; overwritten.
        count: how many steps were made, with this one.
        lr: the learning rate.
        beta1: the decay of ``exp_avgs``.
        beta2: the decay of ``exp_avg_sqs``.
        eps: added to the denominator.
        weight_decay: the decay of the weights.
        decoupled: whether that shrinks the weights, as AdamW's does, or is added to the gradient.
        fused: whether they shrink as by torch's fused kernel. Otherwise torch multiplies them by ``1 - lr * weight_decay`` in
            fp32, which rounds 1 - 1e-7 to 1 - 1.2e-7.
    """
    launch, table = _prepare([values, lows, gradients, exp_avgs, exp_avg_sqs])
    is_in_fp32 = fused and _fused_is_in_fp32(table.device)
    if is_in_fp32:
        beta1, beta2 = struct.unpack("ff", struct.pack("ff", beta1, beta2))
    corrections_dtype = torch.float32 if is_in_fp32 else torch.float64
    stream = _stream_of(table.device)
    corrections = _corrections(count, beta1, beta2, corrections_dtype, table.device, stream)
    rates = lr, weight_decay, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps
    launch(_adam, table, corrections, *rates, DECAYS=weight_decay != 0, DECOUPLED=decoupled, FUSED=fused)
    # Made now, while the device is busy, and found in the cache at the next step. This one is made: it fails no more.
    with contextlib.suppress(RuntimeError):
        _corrections(count + 1, beta1, beta2, corrections_dtype, table.device, stream)


def _stream_of(device: torch.device) -> int:
    """The stream on which a device now works. What is made on one may not be there yet for what another one does."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=16)
def _corrections(
    count: float, beta1: float, beta2: float, dtype: torch.dtype, device: torch.device, stream: int
) -> torch.Tensor:
    """What corrects the bias of both states. It is made as torch makes it: in fp32, 1 - 0.999 is another number."""
    steps = torch.full((), count, dtype=dtype, device=device)
    return torch.stack([1 - beta1**steps, (1 - beta2**steps).sqrt()]).float()


@functools.cache
def _fused_is_in_fp32(device: torch.device) -> bool:
    """Whether torch's fused kernel has the decays and what it makes of them in fp32. Up to some version it had them in fp64.

    The two differ in the fifth digit of 1 - 0.999. So a step is tried, of one element.
    """
    weight, gradient, exp_avg, exp_avg_sq, step = torch.tensor([[0.0], [1.0], [0.0], [0.0], [1.0]], device=device).unbind()
    try:
        torch._fused_adamw_(
            [weight],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step.squeeze()],
            lr=0.0,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1.0,
            amsgrad=False,
            maximize=False,
        )
    except (AttributeError, RuntimeError, TypeError):  # it is private, and may go
        return False
    return exp_avg_sq.item() != torch.tensor(1 - 0.999).item()


def _prepare(columns: Sequence[Sequence[torch.Tensor]]) -> tuple[Any, torch.Tensor]:
    """Make what starts a kernel, with a program for each block of each tensor, and the table of the addresses and sizes."""
    device = columns[0][0].device
    sizes = tuple([tensor.numel() for tensor in columns[0]])
    stream = _stream_of(device)
    places, programs = _blocks(sizes, device, stream)
    entries: list[int] = []
    for column in columns:
        entries += [tensor.data_ptr() for tensor in column]
    table, is_aligned = _table((*entries, *sizes), len(columns) + 1, device, stream)

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        if programs:
            with torch.cuda.device_of(table):
                shape = {"ALIGNED": is_aligned, "BLOCK": _BLOCK, "num_warps": _WARPS}
                kernel[(programs,)](*arguments, places, len(sizes), **constants, **shape)

    return launch, table


@functools.lru_cache(maxsize=256)
def _table(entries: tuple[int, ...], rows: int, device: torch.device, stream: int) -> tuple[torch.Tensor, bool]:
    """The addresses and sizes on the device, and whether all addresses are aligned.

    From one step to the next they are mostly the same: torch gives freed memory out again in the same order.
    """
    # By the buffer of an array: torch.tensor() takes ten times as long over so many numbers.
    table = torch.frombuffer(array("q", entries), dtype=torch.int64).view(rows, -1)
    if device.type == "cuda":
        table = table.pin_memory()
    is_aligned = not bool((table[:-1] & (_ALIGNMENT - 1)).any())
    return table.to(device, non_blocking=True), is_aligned


@functools.lru_cache(maxsize=256)
def _blocks(sizes: tuple[int, ...], device: torch.device, stream: int) -> tuple[torch.Tensor, int]:
    """For each program its tensor's number, then for each its block's number in that; and how many programs there are."""
    counts = torch.tensor([-(-size // _BLOCK) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first_programs = torch.cumsum(counts, 0) - counts
    blocks = torch.arange(len(tensors)) - first_programs[tensors]
    return torch.stack([tensors, blocks]).to(device, torch.int32), len(tensors)


@triton.jit
def _this_program(places):
    """The number of this program's tensor, and that of its block in the tensor."""
    tensor = tl.load(places + tl.program_id(0))
    block = tl.load(places + tl.num_programs(0) + tl.program_id(0))
    return tensor, block.to(tl.int64)


@triton.jit
def _pointer(table, row, tensors, tensor, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor, from a row of the table."""
    pointer = tl.load(table + row * tensors + tensor).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _joined(value, low):
    """The bits of an fp32 weight. Low bits that no split leaves are dropped: something else has written the value since."""
    size = value & 0x7FFF
    is_stale = (size >= 0x7F80) | ((size == 0) & (low < 0))  # infinity or NaN; a zero, below which there is nothing
    return (value << 16) + tl.where(is_stale, 0, low)


@triton.jit
def _parted(bits):
    """The bf16 value and the low bits of an fp32 weight. A NaN has no low bits, which could make it a number."""
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    low = tl.where(is_nan, 0, (bits << 16) >> 16)  # with its sign
    value = tl.where(is_nan, 0x7FC0, (bits - low) >> 16)
    return value, low


@triton.jit
def _join_elements(value, low, weight, i, mask):
    joined = _joined(tl.load(value + i, mask).to(tl.int32), tl.load(low + i, mask).to(tl.int32))
    tl.store(weight + i, joined, mask)


@triton.jit
def _join(table, places, tensors, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    tensor, block = _this_program(places)
    value = _pointer(table, 0, tensors, tensor, tl.int16, ALIGNED)
    low = _pointer(table, 1, tensors, tensor, tl.int16, ALIGNED)
    weight = _pointer(table, 2, tensors, tensor, tl.int32, ALIGNED)
    size = tl.load(table + 3 * tensors + tensor)
    i = block * BLOCK + tl.arange(0, BLOCK)
    # Under a mask, a thread reads one element at a time.
    if (block + 1) * BLOCK <= size:
        _join_elements(value, low, weight, i, None)
    else:
        _join_elements(value, low, weight, i, i < size)


@triton.jit
def _split_elements(value, low, weight, i, mask):
    new_value, new_low = _parted(tl.load(weight + i, mask))
    tl.store(low + i, new_low.to(tl.int16), mask)
    tl.store(value + i, new_value.to(tl.int16), mask)


@triton.jit
def _split(table, places, tensors, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    tensor, block = _this_program(places)
    value = _pointer(table, 0, tensors, tensor, tl.int16, ALIGNED)
    low = _pointer(table, 1, tensors, tensor, tl.int16, ALIGNED)
    weight = _pointer(table, 2, tensors, tensor, tl.int32, ALIGNED)
    size = tl.load(table + 3 * tensors + tensor)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= size:
        _split_elements(value, low, weight, i, None)
    else:
        _split_elements(value, low, weight, i, i < size)


@triton.jit
def _adam_elements(
    value, low, gradient, exp_avg, exp_avg_sq, i, mask, step_size, correction2_sqrt,
    lr, weight_decay, shrink, beta1, rest1, beta2, rest2, eps,
    DECAYS: tl.constexpr, DECOUPLED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    joined = _joined(tl.load(value + i, mask).to(tl.int32), tl.load(low + i, mask).to(tl.int32))
    weight = joined.to(tl.float32, bitcast=True)
    g = tl.load(gradient + i, mask).to(tl.float32)
    if DECAYS:
        if not DECOUPLED:
            g += weight * weight_decay
        elif FUSED:
            weight -= lr * weight_decay * weight
        else:
            weight *= shrink
    m = tl.fma(beta1, tl.load(exp_avg + i, mask), rest1 * g)
    v = tl.fma(beta2, tl.load(exp_avg_sq + i, mask), rest2 * (g * g))
    weight -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), correction2_sqrt) + eps)
    new_value, new_low = _parted(weight.to(tl.int32, bitcast=True))
    tl.store(exp_avg + i, m, mask)
    tl.store(exp_avg_sq + i, v, mask)
    tl.store(low + i, new_low.to(tl.int16), mask)
    tl.store(value + i, new_value.to(tl.int16), mask)


@triton.jit
def _adam(
    table, corrections, lr, weight_decay, shrink, beta1, rest1, beta2, rest2, eps, places, tensors,
    DECAYS: tl.constexpr, DECOUPLED: tl.constexpr, FUSED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, block = _this_program(places)
    value = _pointer(table, 0, tensors, tensor, tl.int16, ALIGNED)
    low = _pointer(table, 1, tensors, tensor, tl.int16, ALIGNED)
    gradient = _pointer(table, 2, tensors, tensor, tl.bfloat16, ALIGNED)
    exp_avg = _pointer(table, 3, tensors, tensor, tl.float32, ALIGNED)
    exp_avg_sq = _pointer(table, 4, tensors, tensor, tl.float32, ALIGNED)
    size = tl.load(table + 5 * tensors + tensor)
    step_size = tl.div_rn(lr, tl.load(corrections))
    correction2_sqrt = tl.load(corrections + 1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= size:
        _adam_elements(
            value, low, gradient, exp_avg, exp_avg_sq, i, None, step_size, correction2_sqrt,
            lr, weight_decay, shrink, beta1, rest1, beta2, rest2, eps, DECAYS, DECOUPLED, FUSED,
        )  # fmt: skip
    else:
        _adam_elements(
            value, low, gradient, exp_avg, exp_avg_sq, i, i < size, step_size, correction2_sqrt,
            lr, weight_decay, shrink, beta1, rest1, beta2, rest2, eps, DECAYS, DECOUPLED, FUSED,
        )  # fmt: skip
