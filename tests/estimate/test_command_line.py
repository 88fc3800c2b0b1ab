"""What ``python -m precision_policy`` prints and plots, compared with the text that is kept beside this file."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from precision_policy.__main__ import main, plot
from precision_policy.estimate.checkpoint import summarize

pytestmark = pytest.mark.once


def tensors(*shapes, dtype=torch.bfloat16, size=0.02):
    """Parameters with values from 2^-7 of the size up to it, the same everywhere."""
    made = []
    for shape in shapes:
        values = torch.linspace(size / 128, size, torch.Size(shape).numel()).reshape(shape)
        made.append(nn.Parameter(values.to(dtype)))
    return made


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
