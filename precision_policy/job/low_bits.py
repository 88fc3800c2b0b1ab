"""An fp32 number as the bf16 number that it rounds to and the 16 bits that this leaves over.

On the bits as integers, ``low`` is the lower half as a signed number and ``high`` is ``(bits - low) >> 16``, the bits of the
bf16 number. It rounds to nearest, ties away from zero, where ``Tensor.bfloat16()`` rounds ties to even. The low bits are stored
as a bf16 tensor that holds their pattern: collectives of gloo and NCCL carry no int16, and torch casts integers on loading.

All tensors here are flat and of one size. ``room`` is an fp32 tensor whose values are lost.
"""

from __future__ import annotations

import math
from typing import Final

import torch

_HALF: Final = 0x8000
_NAN: Final = 0x7FC00000
_INFINITY: Final = 0x7F800000
_MAGNITUDE: Final = 0x7FFFFFFF


def join(weights: torch.Tensor, lows: torch.Tensor, room: torch.Tensor) -> None:
    """Add the low bits to weights that were widened from bf16, in place.

    Something else may have written the weights since the low bits were split off. Any low bits give a number within half a bf16
    step of the weight, but for three cases, in which they are dropped: the weight is infinite or NaN, or it is zero and the low
    bits are negative.

    Args:
        weights: fp32, each a value of bf16.
        lows: the low bits, int16 or viewed as bf16.
        room: fp32.
    """
    bits = weights.view(torch.int32)
    low = room.view(torch.int32)
    low.copy_(lows.view(torch.int16))
    if weights.is_cpu:
        bits.add_(low)
        # Each of the three cases gives a NaN, an infinity or a number above 3e38: the sum of squares is then not finite.
        if math.isfinite(torch.dot(weights, weights)):
            return
        bits.sub_(low)
    magnitude = bits & _MAGNITUDE
    is_finite = magnitude < _INFINITY
    can_take_low = (magnitude > 0) | (low >= 0)
    bits.add_(torch.where(is_finite & can_take_low, low, 0))


def round_off(weights: torch.Tensor, room: torch.Tensor) -> None:
    """Leave in ``room`` the bits of the rounded weights, as int32; the low bits are then the lower half of ``weights``.

    A NaN becomes bf16's own NaN with no low bits: the NaN that CUDA's arithmetic makes would round to zero. Otherwise the
    weights stay as they are. Nothing here takes memory, so that it cannot run out at this point.
    """
    bits = weights.view(torch.int32)
    high = room.view(torch.int32)
    # One pass on a CPU, where looking is cheap; on a GPU, looking would make the host wait.
    if not weights.is_cpu or not math.isfinite(weights.sum()):
        is_nan = room.view(torch.bool)[: len(weights)]
        torch.ne(weights, weights, out=is_nan)
        bits.masked_fill_(is_nan, _NAN)
    torch.add(bits, _HALF, out=high)
    high.bitwise_right_shift_(16)


def write(weights: torch.Tensor, room: torch.Tensor, values: torch.Tensor, lows: torch.Tensor) -> None:
    """Write what :func:`round_off` left: the bf16 values and the pattern of the low bits. It can be done again."""
    values.view(torch.int16).copy_(room.view(torch.int32))
    lows.view(torch.int16).copy_(weights.view(torch.int32))


def joined(values: torch.Tensor, lows: torch.Tensor | None) -> torch.Tensor:
    """New fp32 numbers from bf16 values and their low bits, of any shape and in the values' strides."""
    weights = torch.empty_like(values, dtype=torch.float32)
    weights.copy_(values)
    if lows is not None and values.numel():
        flat = weights.reshape(-1)
        join(flat, lows.reshape(-1), torch.empty_like(flat))
        weights.copy_(flat.view(weights.shape))
    return weights


def parted(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """New bf16 values and low bits of fp32 numbers, of any shape; the numbers stay as they are."""
    flat = weights.reshape(-1).clone()
    room = torch.empty_like(flat)
    values, lows = (torch.empty_like(flat, dtype=torch.bfloat16) for _ in range(2))
    round_off(flat, room)
    write(flat, room, values, lows)
    return values.view(weights.shape), lows.view(weights.shape)
