"""``python -m precision_policy`` on checkpoints good and bad."""

import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT
from safetensors.torch import save_file

from precision_policy.__main__ import main

pytestmark = pytest.mark.once


def test_table(checkpoint):
    """As a user runs it: a table by kind, one column per learning rate."""
    command = [sys.executable, "-m", "precision_policy", str(checkpoint), "--lr", "1e-5"]
    out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert "lr 1e-05" in out
    for kind in ("attention (bf16)", "embedding (bf16)", "feed-forward (bf16)", "1-dimensional (bf16)", "all (bf16)"):
        assert kind in out


def test_plot(checkpoint, tmp_path):
    assert main([str(checkpoint), "--plot", str(tmp_path / "lost.png")]) == 0
    assert (tmp_path / "lost.png").read_bytes().startswith(b"\x89PNG")


def test_plot_that_cannot_be_written(checkpoint, tmp_path, capsys):
    assert main([str(checkpoint), "--plot", str(tmp_path / "no/such/folder.png")]) == 1
    assert "--plot" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "safetensors"])
def test_extras_that_are_missing(checkpoint, missing, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main([str(checkpoint), "--plot", str(tmp_path / "x.png")]) == 1
    assert f"pip install {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 100])
def test_broken_files(tmp_path, content, capsys):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert main([str(tmp_path)]) == 1
    assert "model.safetensors: not a readable safetensors file" in capsys.readouterr().err


def test_truncated_file(tmp_path, capsys):
    save_file({"w": torch.ones(1000, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    assert main([str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_there(tmp_path, capsys):
    assert main([str(tmp_path / "no")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "no *.safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("tensors", [{"w": torch.ones(4)}, {}, {"w": torch.ones(4, dtype=torch.int64)}])
def test_nothing_in_16_bits(tmp_path, tensors, capsys):
    save_file(tensors, tmp_path / "model.safetensors")
    assert main([str(tmp_path)]) == 0
    assert "no bf16 or fp16 weights" in capsys.readouterr().out


def test_wrong_learning_rate(checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(checkpoint), "--lr", "-1"])
    assert stopped.value.code == 2
    assert "not a positive number" in capsys.readouterr().err


def test_rates_as_given(checkpoint, capsys):
    assert main([str(checkpoint), "--lr", "2.5e-5"]) == 0
    head = capsys.readouterr().out.splitlines()[4]
    assert head.split("lr ")[1:] == ["0.00025   ", "7.5e-05   ", "2.5e-05   ", "7.5e-06   ", "2.5e-06"]


def test_a_schedule(checkpoint, capsys):
    """From its peak to its end."""
    assert main([str(checkpoint), "--lr", "3e-4:3e-6"]) == 0
    rates = [float(part) for part in capsys.readouterr().out.splitlines()[4].split("lr ")[1:]]
    assert (rates[0], rates[2], rates[-1]) == (3e-4, 3e-5, 3e-6)


@pytest.mark.parametrize("rate", ["abc", "1e-4:", "1:2:3", "nan", "inf"])
def test_rates_that_are_none(checkpoint, capsys, rate):
    with pytest.raises(SystemExit):
        main([str(checkpoint), "--lr", rate])
    assert "positive number, such as 1e-5" in capsys.readouterr().err or rate == "1:2:3"


def test_matplotlib_is_missed_before_the_reading(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(tmp_path / "no such checkpoint"), "--plot", "x.png"]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}', "{}", "not json"])
def test_an_index_that_names_more_than_there_is(tmp_path, capsys, index):
    save_file({"a": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert main([str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert ("model-2.safetensors" in err) if "model-2" in index else ("not a readable index" in err)


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
