"""What a first gradient tells of the dtype that it was computed in.

An fp32 parameter that is computed in bf16 (fp16) gets a gradient that was rounded to that format on its way, so the low 16 (13)
bits of each element are zero. Products in fp32 and TF32 leave such zeros by chance alone. Bits that are not zero tell nothing:
a penalty on the weights, a normalized weight and a second use of the weight add to a rounded gradient in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from precision_policy.estimate import parameters

_MATRICES: Final = 8  # looked at for each optimizer
_ELEMENTS: Final = 2048  # of each
_FEWEST: Final = 64  # non-zero elements that tell anything
_DISTINCT: Final = 32  # values among them: the gradients of a toy are often a few small integers, exact in any format
_ROUNDED: Final = 0.99  # the share of elements with zero bits above which a gradient was rounded


@dataclass(frozen=True)
class ZeroBits:
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


def zero_bits(gradient: torch.Tensor) -> torch.Tensor:
    """Count in an fp32 gradient what :class:`ZeroBits` holds, as four int64 on its device, without waiting for that."""
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


def computed_in(samples: Iterable[ZeroBits]) -> str | None:
    """What matrices were computed in: "bf16", "fp16", either of them "at least in part", or None where gradients do not tell.

    One embedding among them whose gradient is a sum must not deny what the others show, so half of them are enough.
    """
    usable = [sample for sample in samples if sample.nonzero >= _FEWEST and sample.distinct >= _DISTINCT]
    bf16 = sum(sample.zero_16 / sample.nonzero > _ROUNDED for sample in usable)
    fp16 = sum(sample.zero_13 / sample.nonzero > _ROUNDED for sample in usable) - bf16
    for name, count in (("bf16", bf16), ("fp16", fp16)):
        if count:
            return name if 2 * count >= len(usable) else f"{name} at least in part"
    return None


class FirstGradients:
    """Looks once at the first gradients of a few matrices of one optimizer; what it sees stays on the device until read."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._seen: list[torch.Tensor] = []
        self._handles: list[Any] = []
        spread: list[torch.Tensor] = []  # evenly over the groups
        for group in optimizer.param_groups[: 4 * _MATRICES]:
            spread += group["params"][:: max(1, len(group["params"]) // (4 * _MATRICES))]
        matrices = [p for p in spread if _can_tell(p)]
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
                self._seen.append(zero_bits(gradient))
        except Exception:  # a gradient that cannot be read tells nothing, and must not end the backward pass
            return

    def read(self) -> str | None:
        """What the matrices were computed in, or None; waits for the device once. No hook is left behind."""
        self.close()
        if not self._seen:
            return None
        device = self._seen[0].device
        rows: list[list[int]] = torch.stack([row for row in self._seen if row.device == device]).tolist()
        return computed_in(ZeroBits(*row) for row in rows)

    def close(self) -> None:
        """Remove the hooks that have not fired."""
        while self._handles:
            self._handles.pop().remove()


def _can_tell(param: torch.Tensor) -> bool:
    """Whether it is a whole fp32 matrix: the hooks of shards do not fire, and a lazy module's parameter has no shape yet."""
    if type(param) not in (nn.Parameter, torch.Tensor) or hasattr(param, "_local_tensor"):
        return False
    return param.dim() > 1 and param.requires_grad and param.is_leaf and param.dtype is torch.float32
