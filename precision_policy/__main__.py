"""``python -m precision_policy CHECKPOINT --lr 1e-5``: what share of a checkpoint's weights an update could not move."""

from __future__ import annotations

import argparse
import math
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
        description="Share of a checkpoint's 16-bit weights that an update of size lr cannot move. A floor for what an "
        "Adam-like optimizer loses at that learning rate; no promise about the final loss.",
    )
    parser.add_argument("checkpoint", type=Path, help="a safetensors file, or a directory that holds some")
    parser.add_argument(
        "--lr", type=_rates, default="1e-5", help="the learning rate, or PEAK:END of a schedule (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the share against the learning rate")
    given = parser.parse_args(arguments)
    peak, rates = given.lr
    try:
        pyplot = _pyplot() if given.plot else None  # told before the reading, which may take a while
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
    lines.append(f"{'':<24}{'weights':>16}" + "".join(f"{f'lr {rate:.3g}':>13}" for rate in rates))
    for dtype in {dtype: None for _, dtype in summary.histograms}:
        rows = {kind: h for (kind, its), h in sorted(summary.histograms.items(), key=lambda x: x[0][0]) if its is dtype}
        for kind, histogram in {**rows, "all": together(dtype, rows.values())}.items():
            shares = "".join(f"{histogram.lost(rate):>13.1%}" for rate in rates)
            lines.append(f"{f'{kind} ({short_name(dtype)})':<24}{histogram.total:>16,}{shares}")
    return "\n".join(lines)


def plot(summary: Summary, lr: float, file: Path, pyplot: Any) -> None:
    """Draw the share lost against the learning rate, one line per kind of parameter: a staircase, as exponents are counted.

    Raises:
        CheckpointError: the file cannot be written.
    """
    first = math.floor(math.log2(lr)) - 7
    rates = [2.0**power for power in range(first, first + 15)]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = [("-", "0.0"), ("--", "0.0"), ("-.", "0.35"), (":", "0.0"), ("-", "0.6")]  # told apart without colour
    for index, ((kind, dtype), histogram) in enumerate(sorted(summary.histograms.items(), key=lambda x: x[0][0])):
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
