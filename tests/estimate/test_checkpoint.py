"""Checkpoints on disk: read in parts by several workers, and large ones by an even sample."""

import pytest
import torch
from safetensors.torch import save_file

from precision_policy.__main__ import main

pytestmark = pytest.mark.once


def test_read_in_parts(tmp_path, monkeypatch):
    """Parts of tensors that several workers read add up to the whole."""
    from precision_policy.estimate import checkpoint as module

    tensor = (torch.randn(1000, 7) * 0.02).to(torch.bfloat16)
    save_file({"w": tensor, "scalar": torch.ones((), dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    whole = module.summarize(tmp_path)
    monkeypatch.setattr(module, "_PIECE", 333)
    parts = module.summarize(tmp_path)
    assert parts == whole
    assert whole.elements == {torch.bfloat16: 7001}


def test_a_large_checkpoint_is_sampled_and_says_so(tmp_path, monkeypatch, capsys):
    """An even sample over tensors large and small; what it adds up to is still every weight."""
    from precision_policy.estimate import checkpoint as module

    tensors = {f"w{i}": torch.full((99, 100), 2.0**-i, dtype=torch.bfloat16) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "_SAMPLE", 10_000)
    summary = module.summarize(tmp_path)
    (histogram,) = summary.histograms.values()
    assert (summary.stride, histogram.total, histogram.seen) == (4, 39_600, 9_900)
    assert [histogram.counts[127 - i] for i in range(4)] == [2475] * 4
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "weights: 39,600 in bf16; one in 4 was looked at"
    save_file({"w": torch.ones(40_000)}, tmp_path / "model.safetensors")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "weights: 40,000 in fp32"


def test_small_tensors_are_no_larger_part_of_the_sample(tmp_path, monkeypatch):
    """The sample goes on from tensor to tensor: if each began anew, every one of these would give an element."""
    from precision_policy.estimate import checkpoint as module

    scalars = {f"s{i:03d}": torch.ones((), dtype=torch.bfloat16) for i in range(100)}
    save_file({**scalars, "w": torch.ones(900, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "_SAMPLE", 100)
    summary = module.summarize(tmp_path)
    assert {kind: h.seen for (kind, _), h in summary.histograms.items()} == {"1-dimensional": 100}
