"""Parameters as the numbers see them: which are trainable in 16 bits, how large the whole of a shard is, an even sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Final

import torch

KINDS: Final = ("matrices", "1-dimensional", "flattened by FSDP")

# Attributes of FSDP1's parameters (torch/distributed/fsdp/_flat_param.py, torch 2.13): a flat parameter's size before it was
# sharded, and the mark of an original parameter that is now a view into one.
_FLAT_SIZE, _FLATTENED = "_unpadded_unsharded_size", "_fsdp_flattened"


def trainable(params: Iterable[torch.Tensor], dtypes: Collection[torch.dtype]) -> list[torch.Tensor]:
    """The parameters that are trained and stored in one of these dtypes."""
    return [p for p in params if p.dtype in dtypes and p.requires_grad]


def short_name(dtype: torch.dtype) -> str:
    """A dtype as people say it."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor  # to_local() would wait for the others


def whole_size(param: torch.Tensor) -> int:
    """The elements of the whole parameter; those of this rank's shard where the whole size is not known."""
    return int(getattr(param, _FLAT_SIZE, param).numel())


def has_unknown_size(param: torch.Tensor) -> bool:
    """Whether it is a view into FSDP1's shard (``use_orig_params``), which does not tell the size of its whole."""
    return hasattr(param, _FLATTENED) and not hasattr(param, _FLAT_SIZE)


def is_shard(param: torch.Tensor) -> bool:
    """Whether this process holds only a part of the parameter."""
    return local(param).numel() != whole_size(param) or has_unknown_size(param)


def kind(param: torch.Tensor) -> str:
    """One of ``KINDS``."""
    if hasattr(param, _FLAT_SIZE) or hasattr(param, _FLATTENED):
        return KINDS[2]
    return KINDS[0] if param.dim() > 1 else KINDS[1]


class EvenSample:
    """Views of every n-th element over many tensors, as if they were one.

    Each tensor goes on where the one before it stopped. If each began anew, every tensor smaller than the stride would give
    one element, and many of those would be too many.

    Args:
        stride: the n.
        before: how many elements of the whole another sample has gone through already.
    """

    def __init__(self, stride: int, before: int = 0) -> None:
        self._stride = stride
        self._offset = -before % stride

    def of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """One-dimensional views of the elements to look at; they share the tensor's memory."""
        views = []
        for flat in flat_views(tensor):
            views.append(flat[self._offset :: self._stride] if self._stride > 1 else flat)
            self._offset = (self._offset - flat.numel()) % self._stride
        return views


def stride_for(elements: int, most: int) -> int:
    """The stride with which an even sample of so many elements has about ``most``, and no more."""
    return max(1, -(-elements // most))


def flat_views(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements as one-dimensional views, without copying them, in any order."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)
        return
    by_stride = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.size(d)), reverse=True)
    dense = tensor.permute(by_stride)
    if dense.is_contiguous():
        yield dense.view(-1)
    elif tensor.dim() == 1:
        yield tensor
    else:
        for part in tensor.unbind(0):
            yield from flat_views(part)
