"""The estimate for a checkpoint on disk: its safetensors are read tensor by tensor, no model is made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from precision_policy.estimate import histogram as estimate

# The names that transformers and timm give; in order, the first that matches counts.
_KINDS = (
    ("embedding", re.compile(r"embed|wte|wpe|lm_head", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj|qkv", re.IGNORECASE)),
    ("feed-forward", re.compile(r"mlp|ffn|feed_forward|expert|fc\d|(up|down|gate)_proj", re.IGNORECASE)),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what is wrong with it."""


@dataclass
class Summary:
    """What a checkpoint holds.

    Attributes:
        histograms: by kind of parameter and dtype.
        elements: by dtype, all of them, the estimable ones included.
    """

    histograms: dict[tuple[str, torch.dtype], estimate.Histogram] = field(default_factory=dict)
    elements: dict[torch.dtype, int] = field(default_factory=dict)


def files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint given as one file or as a directory.

    Raises:
        CheckpointError: there is nothing there, or nothing in that format.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{path}: no *.safetensors file in this directory")
    return found


def summarize(path: Path) -> Summary:
    """Count the exponents of every 16-bit tensor of a checkpoint.

    Raises:
        CheckpointError: a file is missing, empty, or not in the safetensors format, or safetensors is not installed.
    """
    summary = Summary()
    for file in files(path):
        for name, tensor in _tensors(file):
            summary.elements[tensor.dtype] = summary.elements.get(tensor.dtype, 0) + tensor.numel()
            if tensor.dtype in estimate.FORMATS:
                counted, _ = estimate.histogram([tensor], tensor.dtype)
                summary.histograms.setdefault((kind(name, tensor), tensor.dtype), estimate.Histogram(tensor.dtype)).add(counted)
    return summary


def kind(name: str, tensor: torch.Tensor) -> str:
    """Which kind of parameter a tensor is, told from its shape and its name."""
    if tensor.dim() <= 1:
        return "1-dimensional"
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other matrices")


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open  # an optional extra, for this command alone
    except ImportError:
        raise CheckpointError("reading checkpoints needs safetensors: pip install safetensors") from None
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping, and has no __iter__
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None
