"""``python -m precision_policy CHECKPOINT --lr 1e-5``: what share of a checkpoint's weights an update could not move."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from precision_policy.estimate.checkpoint import CheckpointError, Summary, summarize
from precision_policy.estimate.histogram import Histogram

_FACTORS = (10, 3, 1, 0.3, 0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 for a checkpoint that cannot be read and 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m precision_policy",
        description="Share of a checkpoint's 16-bit weights that an update of size lr cannot move. A floor for what an "
        "Adam-like optimizer loses at that learning rate; no promise about the final loss.",
    )
    parser.add_argument("checkpoint", type=Path, help="a safetensors file, or a directory that holds some")
    parser.add_argument("--lr", type=_positive, default=1e-5, help="the learning rate (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the share against the learning rate")
    given = parser.parse_args(arguments)
    try:
        summary = summarize(given.checkpoint)
        print(table(summary, given.lr))
        if given.plot and summary.histograms:
            plot(summary, given.lr, given.plot)
            print(f"\nplot: {given.plot}")
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def table(summary: Summary, lr: float) -> str:
    """The estimate per kind of parameter, one column per learning rate around the given one."""
    stored = ", ".join(f"{count:,} in {_name(dtype)}" for dtype, count in summary.elements.items()) or "none"
    head = f"weights: {stored}"
    if not summary.histograms:
        return f"{head}\nno bf16 or fp16 weights: nothing here is lost to 16-bit storage"
    rates = [lr * factor for factor in _FACTORS]
    lines = [head, "", "share that an update of size lr cannot move", ""]
    lines.append(f"{'':<24}{'weights':>16}" + "".join(f"{f'lr {rate:.0e}':>12}" for rate in rates))
    for dtype in {dtype: None for _, dtype in summary.histograms}:
        rows = {kind: h for (kind, its), h in sorted(summary.histograms.items(), key=lambda x: x[0][0]) if its is dtype}
        for kind, histogram in {**rows, "all": _total(dtype, rows)}.items():
            shares = "".join(f"{histogram.lost(rate):>12.1%}" for rate in rates)
            lines.append(f"{f'{kind} ({_name(dtype)})':<24}{histogram.total:>16,}{shares}")
    return "\n".join(lines)


def plot(summary: Summary, lr: float, file: Path) -> None:
    """Draw the share lost against the learning rate, one line per kind of parameter.

    Raises:
        CheckpointError: matplotlib is not installed, or it cannot write the file.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise CheckpointError("--plot needs matplotlib: pip install matplotlib") from None
    rates = [lr * 10 ** (power / 10) for power in range(-20, 21)]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = ("-", "--", "-.", ":")
    for index, ((kind, dtype), histogram) in enumerate(sorted(summary.histograms.items(), key=lambda x: x[0][0])):
        shares = [100 * histogram.lost(rate) for rate in rates]
        axes.plot(rates, shares, styles[index % 4], linewidth=2, label=f"{kind} ({_name(dtype)})")
    axes.axvline(lr, color="0.5", linewidth=1)
    axes.set(xscale="log", xlabel="learning rate", ylabel="weights that an update of size lr cannot move, %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--plot {file}: {error}") from None
    finally:
        pyplot.close(figure)


def _total(dtype: torch.dtype, rows: dict[str, Histogram]) -> Histogram:
    total = Histogram(dtype)
    for histogram in rows.values():
        total.add(histogram)
    return total


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


if __name__ == "__main__":
    sys.exit(main())
