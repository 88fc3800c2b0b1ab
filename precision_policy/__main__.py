"""``python -m precision_policy CHECKPOINT --lr 1e-5``: what share of a checkpoint's weights an update could not move."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from precision_policy.estimate.checkpoint import CheckpointError, Summary, summarize
from precision_policy.estimate.histogram import together
from precision_policy.estimate.parameters import short_name

_FACTORS = (10, 3, 1, 0.3, 0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 for a checkpoint that cannot be read and 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m precision_policy",
        description="Share of a checkpoint's 16-bit weights that an update of size lr cannot move: what the first step of an "
        "Adam-like optimizer loses at that learning rate. Later updates are mostly smaller. No promise about the final loss.",
    )
    parser.add_argument("checkpoint", type=Path, help="a local path: a safetensors file, or a directory that holds some")
    parser.add_argument(
        "--lr", type=_rates, default="1e-5", help="the learning rate, or PEAK:END of a schedule (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the share against the learning rate")
    given = parser.parse_args(arguments)
    peak, rates = given.lr
    try:
        pyplot = None
        if given.plot:  # what is wrong with it is told before the reading, which may take a while
            pyplot = _pyplot()
            _check_is_writable(given.plot, pyplot)
        summary = summarize(given.checkpoint)
        print(table(summary, rates))
        if pyplot is not None and summary.histograms:
            plot(summary, peak, given.plot, pyplot)
            print(f"\nplot: {given.plot}")
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _rates(text: str) -> tuple[float, list[float]]:
    """The learning rate to mark, and those to show: around a rate, or from a schedule's peak to its end."""
    numbers = [_positive(part) for part in text.split(":")]
    if len(numbers) == 1:
        return numbers[0], [numbers[0] * factor for factor in _FACTORS]
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text} is neither a learning rate nor PEAK:END")
    peak, end = numbers
    return peak, [peak * (end / peak) ** (step / (len(_FACTORS) - 1)) for step in range(len(_FACTORS))]


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number, such as 1e-5")
    return number


def table(summary: Summary, rates: Sequence[float]) -> str:
    """The estimate per kind of parameter, one column per learning rate."""
    stored = ", ".join(f"{count:,} in {short_name(dtype)}" for dtype, count in summary.elements.items()) or "none"
    head = f"weights: {stored}"
    if not summary.histograms:
        return f"{head}\nno bf16 or fp16 weights: nothing here is lost to 16-bit storage"
    if summary.stride > 1:
        head += f"; one in {summary.stride} was looked at"
    lines = [head, "", "share that an update of size lr cannot move", ""]
    names = [f"lr {rate:.3g}" for rate in rates]
    lines.append(f"{'':<24}{'weights':>16}" + "".join(f"{name:>13}" for name in names))
    for dtype in dict.fromkeys(dtype for _, dtype in summary.histograms):
        rows = {kind: its for (kind, of), its in sorted(summary.histograms.items(), key=_by_kind) if of is dtype}
        rows["all"] = together(dtype, rows.values())
        for kind, histogram in rows.items():
            name = f"{kind} ({short_name(dtype)})"
            shares = "".join(f"{histogram.lost(rate):>13.1%}" for rate in rates)
            lines.append(f"{name:<24}{histogram.total:>16,}{shares}")
    return "\n".join(lines)


def _by_kind(entry: tuple[tuple[str, Any], Any]) -> str:
    """The key by which what a checkpoint holds is sorted."""
    return entry[0][0]


def plot(summary: Summary, lr: float, file: Path, pyplot: Any) -> None:
    """Draw the share lost against the learning rate, one line per kind of parameter: a staircase, as exponents are counted.

    Raises:
        CheckpointError: the file cannot be written.
    """
    first = math.floor(math.log2(lr)) - 7
    rates = [2.0**power for power in range(first, first + 15)]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = [("-", "0.0"), ("--", "0.0"), ("-.", "0.35"), (":", "0.0"), ("-", "0.6")]  # told apart without colour
    for index, ((kind, dtype), histogram) in enumerate(sorted(summary.histograms.items(), key=_by_kind)):
        # The share is the same for all rates from one power of two up to the next.
        shares = [100 * histogram.lost(1.5 * rate) for rate in rates]
        line, grey = styles[index % len(styles)]
        label = f"{kind} ({short_name(dtype)})"
        axes.step(
            rates, shares, line, where="post", color=grey, linewidth=2, label=label, marker="os^Dv"[index % 5], markersize=4
        )
    axes.axvline(lr, color="0.5", linewidth=1)
    axes.set(xscale="log", xlabel="learning rate", ylabel="weights that an update of size lr cannot move, %", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--plot {file}: {error}") from None
    finally:
        pyplot.close(figure)


def _check_is_writable(file: Path, pyplot: Any) -> None:
    """Raise CheckpointError where no plot can be written to a file, without touching it."""
    folder = file.parent
    formats = pyplot.Figure().canvas.get_supported_filetypes()
    wrong = ""
    if file.is_dir():
        wrong = "is a directory"
    elif not folder.is_dir():
        wrong = f"there is no directory {folder}"
    elif not os.access(file if file.exists() else folder, os.W_OK):
        wrong = "not allowed to write there"
    elif file.suffix and file.suffix[1:].lower() not in formats:
        wrong = f"no picture format; there are {', '.join(sorted(formats))}"
    if wrong:
        raise CheckpointError(f"--plot {file}: {wrong}")


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise CheckpointError(
            '--plot needs matplotlib: pip install "hydra-precision-policy[plot]" (or pip install matplotlib)'
        ) from None
    return pyplot


if __name__ == "__main__":
    sys.exit(main())
