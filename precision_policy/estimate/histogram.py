"""How much of an Adam run is lost to rounding, told before its first step.

A weight w with ``2**e <= |w| < 2**(e+1)``, stored with p significant bits (bf16: 8, fp16: 11), lies half a step of
``2**(e-p)`` from where rounding would take it to its neighbour: an update smaller than that leaves it bit-identical. Adam's
first update is lr for every element, so the share of weights that an update of size lr cannot move is what its first step
loses. Later updates are mostly smaller, so that more is lost. They can be larger than lr: an element whose first gradient comes
at step 2,000 is moved by 2.94 lr, with the usual betas. The share depends on the weights by their exponents alone: one
histogram of those answers for every learning rate.

At an exact power of two the step towards zero is half as large. Such a weight counts as lost although an update in that
one direction may move it; that is at most one weight in 128, and half of those, in a single exponent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from precision_policy.estimate import parameters

SAMPLE: Final = 2**26
"""Elements looked at, unless told otherwise: about 0.1 s on a CPU."""

_CHUNK: Final = 2**19  # elements; what a pass allocates is two bytes for each of these
_MAGNITUDES: Final = 2**15  # values of 16 bits without the sign


@dataclass(frozen=True)
class _Format:
    """A 16-bit float format: significant bits, the position of the exponent's lowest bit, the exponent's bias."""

    significant: int
    shift: int
    bias: int


FORMATS: Final = {torch.bfloat16: _Format(8, 7, 127), torch.float16: _Format(11, 10, 15)}
"""The storage dtypes that the estimate knows."""


@dataclass
class Histogram:
    """How many elements have which biased exponent.

    Attributes:
        dtype: torch.bfloat16 or torch.float16.
        counts: by biased exponent, 256 long; of the elements that were looked at.
        total: all elements, looked at or not.
    """

    dtype: torch.dtype
    counts: list[int] = field(default_factory=lambda: [0] * 256)
    total: int = 0

    @property
    def seen(self) -> int:
        """How many elements were looked at."""
        return sum(self.counts)

    @property
    def sampled(self) -> bool:
        """Whether some were not looked at."""
        return self.seen < self.total

    def add(self, other: Histogram) -> None:
        """Add the counts of another histogram of the same dtype."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def lost(self, update: float) -> float:
        """The share of elements, 0 to 1, that an update of this size cannot move; 0.0 when nothing was looked at.

        Args:
            update: the size of the update, in the units of the weights; its sign does not matter.
        """
        if not self.seen or math.isnan(update):
            return 0.0
        form = FORMATS[self.dtype]
        if update == 0.0:
            return 1.0
        # update < 2**(e - p)  <=>  e - p >= k, where 2**(k-1) <= update < 2**k
        first_lost = math.frexp(abs(update))[1] + form.significant + form.bias if math.isfinite(update) else 256
        # Subnormals (biased exponent 0) have the step of the smallest normal numbers (1).
        counts = [self.counts[0] + self.counts[1], *self.counts[2:]]
        return sum(counts[max(0, min(first_lost, 256) - 1) :]) / self.seen

    def rate_losing(self, share: float) -> float:
        """The rate below which at least this share of elements, 0 to 1, does not move; a power of two, 0.0 if there is none."""
        form = FORMATS[self.dtype]
        lost = 0
        for exponent in range(255, 0, -1):
            lost += self.counts[exponent]
            if exponent == 1:
                lost += self.counts[0]  # subnormals have the step of the smallest normal numbers
            if lost and lost >= share * self.seen:
                return 2.0 ** (exponent - form.bias - form.significant)
        return 0.0


def together(dtype: torch.dtype, histograms: Iterable[Histogram]) -> Histogram:
    """The sum of histograms of one dtype."""
    total = Histogram(dtype)
    for histogram in histograms:
        total.add(histogram)
    return total


@dataclass(frozen=True)
class GroupEstimate:
    """The estimate for one parameter group and one storage dtype.

    Attributes:
        lr: the group's learning rate, as a float; NaN where it cannot be read.
        histogram: of its trainable elements in that dtype.
        lost: the share of those, 0 to 1, that an update of size lr cannot move.
        kinds: the histogram's parts, by kind of parameter.
    """

    lr: float
    histogram: Histogram
    lost: float
    kinds: dict[str, Histogram] = field(default_factory=dict)


def lost_updates(param_groups: Iterable[dict[str, Any]], sample: int | None = None) -> list[GroupEstimate]:
    """Estimate, for each parameter group, the share of its weights that an update of size lr cannot move.

    Args:
        param_groups: as in ``optimizer.param_groups``: mappings with ``params`` and ``lr``.
        sample: how many elements to look at, over all groups, evenly spread; None for 2**26.

    Returns:
        One estimate per group and 16-bit dtype among its trainable parameters, in the order of the groups. Sharded
        parameters are counted by this process's shard. Elements that hold no readable values (of meta and sparse tensors,
        say) are in no figure.
    """
    groups = [(as_float(group.get("lr", math.nan)), list(group["params"])) for group in param_groups]
    step = stride([p for _, params in groups for p in params], sample)
    estimates = []
    for lr, params in groups:
        for dtype in FORMATS:
            of_dtype = parameters.trainable(params, (dtype,))
            if of_dtype:
                kinds = _by_kind(of_dtype, dtype, step)
                whole = together(dtype, kinds.values())
                estimates.append(GroupEstimate(lr, whole, whole.lost(lr), kinds))
    return estimates


def _by_kind(params: Sequence[torch.Tensor], dtype: torch.dtype, step: int) -> dict[str, Histogram]:
    """The exponents of parameters of one dtype, by kind of parameter; without the kinds of which nothing can be read."""
    kinds = {}
    for kind in parameters.KINDS:
        of_kind = [p for p in params if parameters.kind(p) == kind]
        counted = histogram(of_kind, dtype, parameters.EvenSample(step))
        if counted.total:
            kinds[kind] = counted
    return kinds


def as_float(number: Any) -> float:
    """A learning rate as a float; NaN for what is no single real number (a meta tensor, say)."""
    try:
        return float(number)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return math.nan


def stride(params: Sequence[torch.Tensor], sample: int | None) -> int:
    """The stride with which about ``sample`` elements are looked at; see :func:`lost_updates` for None."""
    in_16_bits = parameters.trainable(params, FORMATS)
    return parameters.stride_for(sum(parameters.local(p).numel() for p in in_16_bits), sample or SAMPLE)


def histogram(params: Iterable[torch.Tensor], dtype: torch.dtype, sample: parameters.EvenSample | None = None) -> Histogram:
    """The exponents of parameters of one dtype, all or an even sample."""
    result = Histogram(dtype)
    views = sample or parameters.EvenSample(1)
    for param in params:
        tensor = parameters.local(param)
        try:
            counts = _counts(tensor, FORMATS[dtype], views)
        except (RuntimeError, NotImplementedError, TypeError, AttributeError):
            # Meta, sparse, fake and wrapper-subclass tensors hold nothing that can be read in place, and each refuses in
            # its own way. A diagnosis must not end the job, so what refuses is left out.
            continue
        result.add(Histogram(dtype, counts, int(tensor.numel())))
    return result


@torch.no_grad()
def _counts(tensor: torch.Tensor, form: _Format, views: parameters.EvenSample) -> list[int]:
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise NotImplementedError("no values to read")
    counts = [0] * 256
    for bits in views.of(tensor.detach().view(torch.int16)):
        if bits.numel():
            counts = [a + b for a, b in zip(counts, _bincount(bits, form), strict=True)]
    return counts


def _bincount(bits: torch.Tensor, form: _Format) -> list[int]:
    # Counted by all bits but the sign: neighbours in memory then seldom wait for the same counter, which takes longer.
    total = torch.zeros(_MAGNITUDES, dtype=torch.int64, device=bits.device)
    size = min(_CHUNK, bits.numel())
    magnitudes = torch.empty(size, dtype=torch.int16, device=bits.device)  # one buffer stays in the processor's cache
    for chunk in torch.split(bits, size):
        part = magnitudes[: chunk.numel()]
        torch.bitwise_and(chunk, _MAGNITUDES - 1, out=part)
        total += torch.bincount(part, minlength=_MAGNITUDES)
    counts = total.view(-1, 2**form.shift).sum(1).tolist()
    return [int(count) for count in counts] + [0] * (256 - len(counts))
