"""The estimate for a checkpoint on disk: its safetensors are mapped and read in parallel, no model is made."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from precision_policy.estimate import histogram as estimate
from precision_policy.estimate import parameters

# The names that transformers and timm give; in order, the first that matches counts.
_KINDS = (
    ("embedding", re.compile(r"embed|wte|wpe|lm_head", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj|qkv", re.IGNORECASE)),
    ("feed-forward", re.compile(r"mlp|ffn|feed_forward|expert|fc\d|(up|down|gate)_proj", re.IGNORECASE)),
)
_PIECE: Final = 2**26  # elements that one worker reads at a time
_SAMPLE: Final = 2**28  # elements looked at, evenly spread: a share of so many is off by 0.003% (one standard error) at most


@dataclass(frozen=True)
class _Piece:
    """The part of a tensor that one worker reads.

    Attributes:
        file: the file that holds the tensor.
        name: the tensor's name.
        start: the first of the tensor's elements that is read.
        size: how many are.
    """

    file: Path
    name: str
    start: int
    size: int


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what is wrong with it."""


@dataclass
class Summary:
    """What a checkpoint holds.

    Attributes:
        histograms: by kind of parameter and dtype.
        elements: by dtype, all of them, the estimable ones included.
        stride: every how many elements one was looked at; 1 for all.
    """

    histograms: dict[tuple[str, torch.dtype], estimate.Histogram] = field(default_factory=dict)
    elements: dict[torch.dtype, int] = field(default_factory=dict)
    stride: int = 1


def files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint given as one file or as a directory.

    Raises:
        CheckpointError: there is nothing there, nothing in that format, or not all that the index names.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such file or directory. A local path is wanted: a safetensors file, or a directory that holds some. "
            "Names on a hub are not looked up"
        )
    found = sorted(path.glob("*.safetensors"))
    for index in sorted(path.glob("*.safetensors.index.json")):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index}: not a readable index ({type(error).__name__}: {error})") from None
        missing = sorted(named - {file.name for file in found})
        if missing:
            raise CheckpointError(f"{path}: {index.name} names {len(missing)} more file(s) that are not there: {missing[0]}")
    if not found:
        raise CheckpointError(f"{path}: no *.safetensors file in this directory")
    return found


def summarize(path: Path) -> Summary:
    """Count the exponents of every 16-bit tensor of a checkpoint, on all cores; of a large one, those of an even sample.

    Raises:
        CheckpointError: a file is missing, empty, or not in the safetensors format, or an extra is not installed.
    """
    safe_open, progress = _libraries()
    pieces: list[_Piece] = []
    for file in files(path):
        pieces += _pieces(safe_open, file)
    total = sum(piece.size for piece in pieces)
    summary = Summary(stride=parameters.stride_for(total, _SAMPLE))
    samples = []  # together one sample over all tensors
    before = 0
    for piece in pieces:
        samples.append(parameters.EvenSample(summary.stride, before))
        before += piece.size
    count = functools.partial(_count, safe_open)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each worker counts by itself
    try:
        # Shown on a terminal alone, and only where reading takes longer than two seconds.
        bar = progress(total=total, unit="weights", unit_scale=True, delay=2, disable=None, leave=False)
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            for key, dtype, histogram in pool.map(count, pieces, samples):
                size = histogram.total
                summary.elements[dtype] = summary.elements.get(dtype, 0) + size
                if dtype in estimate.FORMATS:
                    summary.histograms.setdefault((key, dtype), estimate.Histogram(dtype)).add(histogram)
                bar.update(size)
    finally:
        torch.set_num_threads(threads)
    return summary


def kind(name: str, tensor: torch.Tensor) -> str:
    """Which kind of parameter a tensor is, told from its shape and its name."""
    if tensor.dim() <= 1:
        return "1-dimensional"
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other matrices")


def _libraries() -> tuple[Any, Any]:
    """``safe_open`` and the progress bar: optional extras, for this command alone."""
    try:
        from safetensors import safe_open
        from tqdm import tqdm
    except ImportError as error:
        raise CheckpointError(
            f"reading checkpoints needs {error.name}: pip install {error.name}, "
            'or pip install "hydra-precision-policy[checkpoint]"'
        ) from None
    return safe_open, tqdm


def _pieces(safe_open: Any, file: Path) -> list[_Piece]:
    """The pieces of all tensors of a file; an empty tensor is one too."""
    with _readable(file), safe_open(str(file), framework="pt") as opened:
        sizes = {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    pieces = []
    for name, size in sizes.items():
        for start in range(0, max(size, 1), _PIECE):
            pieces.append(_Piece(file, name, start, min(_PIECE, size - start)))
    return pieces


def _count(safe_open: Any, piece: _Piece, sample: parameters.EvenSample) -> tuple[str, torch.dtype, estimate.Histogram]:
    """The kind, dtype and histogram of one piece; the tensor is mapped, not copied."""
    with _readable(piece.file), safe_open(str(piece.file), framework="pt") as opened:
        tensor = opened.get_tensor(piece.name)
        if tensor.dtype not in estimate.FORMATS:
            return "", tensor.dtype, estimate.Histogram(tensor.dtype, total=piece.size)
        part = tensor.reshape(-1)[piece.start : piece.start + piece.size]
        return kind(piece.name, tensor), tensor.dtype, estimate.histogram([part], tensor.dtype, sample)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None
