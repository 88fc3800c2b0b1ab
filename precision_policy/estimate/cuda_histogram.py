"""The exponent histogram as one Triton kernel that reads the weights once; for CUDA tensors, where Triton is installed.

A histogram by atomics, as ``torch.bincount`` does it, is some eighty times slower than reading: the exponents of weights
crowd into a handful of bins. Here every lane counts for itself, eight bins to a 32-bit register: 4-bit fields that are
emptied into 8-bit fields before they can overflow.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

_WINDOWS: Final = 4  # of eight exponents each; what lies below them is not counted, what lies above is counted as one
_INNER: Final = 7  # words per slot between two emptyings: 14 elements, and a 4-bit field holds 15
_OUTER: Final = 18  # emptyings per program: 252 elements, and an 8-bit field holds 255
_BLOCK: Final = 512
_COLUMNS: Final = 64  # 32 bins, one for what lies above, the rest unused: Triton wants a power of two


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def _count(words, out, n, SHIFT: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Each 32-bit word holds two elements. SHIFT: the exponent's lowest bit. FIRST: the first window, exponent // 8."""
    top: tl.constexpr = 0x7FFF & ~((1 << (SHIFT + 3)) - 1)  # the exponent's bits above its lowest three
    start = tl.program_id(0).to(tl.int64) * (BLOCK * INNER * OUTER)
    slot = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype=tl.int32)
    e0, e1, e2, e3, o0, o1, o2, o3, above = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(OUTER):
        a0, a1, a2, a3 = zero, zero, zero, zero
        for j in tl.static_range(INNER):
            at = start + (i * INNER + j) * BLOCK + slot
            word = tl.load(words + at, mask=at < n, other=0)
            for half in tl.static_range(2):
                bits = word if half == 0 else word >> 16
                one = 1 << ((bits >> (SHIFT - 2)) & 0x1C)
                window = bits & top
                a0 += tl.where(window == (FIRST << (SHIFT + 3)), one, 0)
                a1 += tl.where(window == ((FIRST + 1) << (SHIFT + 3)), one, 0)
                a2 += tl.where(window == ((FIRST + 2) << (SHIFT + 3)), one, 0)
                a3 += tl.where(window == ((FIRST + 3) << (SHIFT + 3)), one, 0)
                above += (window > ((FIRST + 3) << (SHIFT + 3))).to(tl.int32)
        e0 += a0 & 0x0F0F0F0F
        e1 += a1 & 0x0F0F0F0F
        e2 += a2 & 0x0F0F0F0F
        e3 += a3 & 0x0F0F0F0F
        o0 += (a0 >> 4) & 0x0F0F0F0F
        o1 += (a1 >> 4) & 0x0F0F0F0F
        o2 += (a2 >> 4) & 0x0F0F0F0F
        o3 += (a3 >> 4) & 0x0F0F0F0F
    row = out + tl.program_id(0) * COLUMNS
    for field in tl.static_range(4):
        tl.store(row + 2 * field, tl.sum((e0 >> (8 * field)) & 0xFF))
        tl.store(row + 2 * field + 1, tl.sum((o0 >> (8 * field)) & 0xFF))
        tl.store(row + 8 + 2 * field, tl.sum((e1 >> (8 * field)) & 0xFF))
        tl.store(row + 8 + 2 * field + 1, tl.sum((o1 >> (8 * field)) & 0xFF))
        tl.store(row + 16 + 2 * field, tl.sum((e2 >> (8 * field)) & 0xFF))
        tl.store(row + 16 + 2 * field + 1, tl.sum((o2 >> (8 * field)) & 0xFF))
        tl.store(row + 24 + 2 * field, tl.sum((e3 >> (8 * field)) & 0xFF))
        tl.store(row + 24 + 2 * field + 1, tl.sum((o3 >> (8 * field)) & 0xFF))
    tl.store(row + 32, tl.sum(above))


def add_counts(bits: torch.Tensor, shift: int, counts: list[int]) -> torch.Tensor:
    """Count the exponents of all but an odd first and last element.

    Args:
        bits: int16 on a CUDA device, contiguous.
        shift: the position of the exponent's lowest bit: 7 for bf16, 10 for fp16.
        counts: by biased exponent, 256 long; added to.

    Returns:
        The elements that are left to count.
    """
    head = int(bits.storage_offset()) % 2
    tail = bits.numel() - (bits.numel() - head) % 2
    words = bits[head:tail].view(torch.int32)
    low = 104 if shift == 7 else 0  # bf16: from 2**-23 on up to 2**9; fp16: all there are
    programs = triton.cdiv(words.numel(), _BLOCK * _INNER * _OUTER)
    out = torch.empty(programs, _COLUMNS, dtype=torch.int32, device=bits.device)
    with torch.cuda.device(bits.device):
        _count[(programs,)](words, out, words.numel(), shift, low // 8, _BLOCK, _INNER, _OUTER, _COLUMNS, num_warps=4)
    *inside, above = out[:, : 8 * _WINDOWS + 1].sum(0).tolist()
    for exponent, number in enumerate(inside, start=low):
        counts[exponent] += number
    if low:
        counts[low + 8 * _WINDOWS] += above  # 512 and more: which exponent exactly makes no difference to any lr < 1
        counts[0] += int(tail - head) - sum(inside) - above  # under 2**-23: every lr over 2**-31 moves them
    else:
        counts[0] -= 2 * (programs * _BLOCK * _INNER * _OUTER - words.numel())  # what is read beyond the end, as zeros
    return torch.cat([bits[:head], bits[tail:]])
