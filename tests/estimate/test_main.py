"""``python -m precision_policy``: what it prints, draws and refuses."""

import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT
from safetensors.torch import save_file
from torch import nn

from precision_policy.__main__ import main, plot
from precision_policy.estimate.checkpoint import summarize

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


@pytest.mark.parametrize(
    ("file", "words"),
    [("no/such/folder.png", "there is no directory"), ("", "is a directory"), ("x.docx", "no picture format; there are ")],
)
def test_plot_that_cannot_be_written(tmp_path, capsys, file, words):
    """Told before the reading: the checkpoint that is not there is not missed."""
    assert main([str(tmp_path / "no such checkpoint"), "--plot", str(tmp_path / file)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"--plot {tmp_path / file}: {words}")
    assert "no such checkpoint" not in err


def test_plot_where_nobody_may_write(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a superuser may write anywhere
    assert main([str(tmp_path / "no such checkpoint"), "--plot", str(tmp_path / "x.png")]) == 1
    assert "not allowed to write there" in capsys.readouterr().err


def test_plot_that_fails_while_it_is_written(checkpoint, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert main([str(checkpoint), "--plot", str(tmp_path / "x.png")]) == 1
    assert "x.png: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-1B"])
def test_a_name_on_a_hub(name, capsys):
    assert main([name]) == 1
    assert f"{name}: no such file or directory. A local path is wanted" in capsys.readouterr().err


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


NAMES = [
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wpe.weight",
    "lm_head.weight",
    "layers.0.self_attn.q_proj.weight",
    "attention.dense.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "h.0.qkv.weight",
    "layers.0.mlp.up.weight",
    "ffn.weight",
    "feed_forward.w1.weight",
    "experts.1.weight",
    "fc2.weight",
    "gate_proj.weight",
    "down_proj.weight",
    "conv.weight",
    "FC.weight",
    "model.norm.weight",
]


def tensors(*shapes, dtype=torch.bfloat16, size=0.02):
    """Parameters with values from 2^-7 of the size up to it, the same everywhere."""
    made = []
    for shape in shapes:
        values = torch.linspace(size / 128, size, torch.Size(shape).numel()).reshape(shape)
        made.append(nn.Parameter(values.to(dtype)))
    return made


def test_the_plot(tmp_path):
    """A staircase for each kind, told apart without colour."""
    from matplotlib import pyplot

    save_file(
        {
            "embed.weight": tensors((64, 64))[0].detach(),
            "mlp.weight": tensors((64, 64), size=1.0, dtype=torch.float16)[0].detach(),
        },
        tmp_path / "model.safetensors",
    )
    kept = []

    class Pyplot:
        close = staticmethod(kept.append)

        def __getattr__(self, name):
            return getattr(pyplot, name)

    plot(summarize(tmp_path), 1e-5, tmp_path / "plot.png", Pyplot())
    (figure,) = kept
    (axes,) = figure.axes
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tuple(figure.get_size_inches()), figure.get_layout_engine().__class__.__name__) == (
        (7, 4.2),
        "ConstrainedLayoutEngine",
    )
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylim()) == ("log", "learning rate", (-2, 102))
    assert axes.get_ylabel() == "weights that an update of size lr cannot move, %"
    first, second, marked = axes.lines
    assert list(marked.get_xdata()) == [1e-5, 1e-5]
    rates = [2.0**power for power in range(-24, -9)]
    for line, label, style, colour, marker in (
        (first, "embedding (bf16)", "-", "0.0", "o"),
        (second, "feed-forward (fp16)", "--", "0.0", "s"),
    ):
        assert list(line.get_xdata()) == rates
        assert (line.get_label(), line.get_linestyle(), line.get_color(), line.get_marker()) == (label, style, colour, marker)
        assert (line.get_drawstyle(), line.get_linewidth()) == ("steps-post", 2)
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["embedding (bf16)", "feed-forward (fp16)"]
    shares = dict(zip(rates, first.get_ydata(), strict=True))
    assert shares[2.0**-24] > shares[2.0**-17] > shares[2.0**-13]
    assert shares[2.0**-17] == pytest.approx(81.1, abs=0.1)  # as for 1e-5 in the table: the same for all rates up to 2^-16
    pyplot.close(figure)


def test_the_command_line(file_regression, capsys, tmp_path, monkeypatch):
    """What it prints, word for word."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    many, few = tmp_path / "many", tmp_path / "few"
    many.mkdir()
    few.mkdir()
    shapes = [(8 + n, 16) for n in range(len(NAMES) - 1)] + [(64,)]
    sizes = [2.0**-n for n in range(len(NAMES))]
    stored = {n: tensors(s, size=z)[0].detach() for n, s, z in zip(NAMES, shapes, sizes, strict=True)}
    halves = {
        "a.weight": tensors((8, 8), dtype=torch.float16)[0].detach(),
        "b.bias": tensors((8,), dtype=torch.float32)[0].detach(),
    }
    save_file(stored, many / "model-1.safetensors")
    save_file(halves, many / "model-2.safetensors")
    save_file({"b.bias": halves["b.bias"], "steps": torch.ones((), dtype=torch.int64)}, few / "model.safetensors")
    (few / "broken.safetensors").write_bytes(b"no")
    given = [
        [str(many)],
        [str(many), "--lr", "3e-3:3e-5"],
        [str(many / "model-2.safetensors"), "--lr", "2.5e-4"],
        [str(few / "model.safetensors")],
        [str(few)],
        [str(tmp_path / "nothing")],
        [str(many), "--plot", str(tmp_path / "no" / "plot.png")],
        [str(many), "--lr", "0"],
        [str(many), "--lr", "x"],
        [str(many), "--lr", "1:2:3"],
        [str(many), "--lr", "inf"],
        ["--help"],
    ]
    lines = []
    for arguments in given:
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        lines += [f"$ {' '.join(arguments)}", printed.out + printed.err, f"exit {status}", ""]
    file_regression.check("\n".join(lines).replace(str(tmp_path), "TMP"))
