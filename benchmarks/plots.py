"""Draw the pictures of docs/evidence.md from the files in docs/evidence, and print the numbers that stand beside them.

python benchmarks/plots.py
"""

import csv
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout's package, where none is installed

from precision_policy.job.message import low_precision, warning
from precision_policy.job.plan import Plan

from precision_policy.job.optimizers import look_up

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent.parent / "docs/evidence"
# Okabe and Ito's palette for the colour-blind; a grey that reads on white and on black, and no background.
COLOURS = {"bf16 storage": "#D55E00", "fp32 storage": "#0072B2", "bf16 + Kahan": "#009E73"}
# Two of the lines lie on each other: the one beneath is broad, the one above thin and dashed.
STYLES = {
    "bf16 storage": {"marker": "o", "linewidth": 2},
    "fp32 storage": {"marker": "s", "linewidth": 5, "markersize": 9, "alpha": 0.8},
    "bf16 + Kahan": {"marker": "^", "linewidth": 2, "linestyle": "--"},
}
GREY = "#808080"
pyplot.rcParams.update(
    {
        "text.color": GREY,
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "font.size": 11,
    }
)


def read() -> dict[tuple[str, float], list[dict[str, str]]]:
    rows = defaultdict(list)
    with (HERE / "finetune.csv").open() as file:
        for row in csv.DictReader(file):
            rows[row["way"], float(row["lr"])].append(row)
    return rows


def numbers(rows: dict[tuple[str, float], list[dict[str, str]]], ways: list[str], rates: list[float]) -> None:
    """The page's tables: means over the seeds, and what the warning says of memory against what was measured."""

    def mean(way: str, lr: float, key: str) -> float:
        return statistics.mean(float(row[key]) for row in rows[way, lr])

    print(f"loss before: {mean(ways[0], rates[0], 'loss before'):.3f}; loss after, by way")
    for lr in reversed(rates):
        print(f"  {lr:g}: " + ", ".join(f"{way} {mean(way, lr, 'loss after'):.3f}" for way in ways))
    print("bf16 storage, share that stays, %: predicted / seen at the first step, seen at the middle and last step")
    for lr in reversed(rates):
        shares = [100 * mean("bf16 storage", lr, key) for key in ("predicted first", "seen first", "seen middle", "seen last")]
        print(f"  {lr:g}: " + " / ".join(f"{share:.1f}" for share in shares))
    elements = int(re.search(r"([\d,]+) parameters", (HERE / "machine.txt").read_text())[1].replace(",", ""))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.empty(elements, dtype=torch.bfloat16, device="meta"))], lr=1e-5)
    text = warning(optimizer, look_up(optimizer), low_precision(optimizer), Plan("precision_policy=on")).text
    print("the warning: " + next(line.strip() for line in text.splitlines() if "fp32 storage adds" in line))
    added = mean("fp32 storage", rates[0], "steady bytes") - mean("bf16 storage", rates[0], "steady bytes")
    print(
        f"measured: {added / 2**20:.1f} MiB; 8 bytes an element are {8 * elements / 2**20:.1f} MiB, ratio {added / 8 / elements:.4f}"
    )


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=150, transparent=True)
    pyplot.close(figure)


def main() -> None:
    rows = read()
    ways = list(dict.fromkeys(way for way, _ in rows))
    rates = sorted({lr for _, lr in rows})
    numbers(rows, ways, rates)

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for way in ways:
        losses = [[float(row["loss after"]) for row in rows[way, lr]] for lr in rates]
        means = [statistics.mean(one) for one in losses]
        errors = [
            [m - min(one) for m, one in zip(means, losses, strict=True)],
            [max(one) - m for m, one in zip(means, losses, strict=True)],
        ]
        axes.errorbar(rates, means, errors, color=COLOURS[way], label=way, capsize=3, **STYLES[way])
    before = float(rows[ways[0], rates[0]][0]["loss before"])
    axes.axhline(before, color=GREY, linestyle=":", label="before fine-tuning")
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss after 300 steps")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0)
    save(figure, "loss.png")

    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    for way, filled in (("bf16 storage", True), ("bf16 + Kahan", False)):
        for moment, marker in (("first", "o"), ("middle", "D"), ("last", "s")):
            x = [100 * float(row[f"predicted {moment}"]) for lr in rates for row in rows[way, lr]]
            y = [100 * float(row[f"seen {moment}"]) for lr in rates for row in rows[way, lr]]
            face = COLOURS[way] if filled else "none"
            axes.scatter(x, y, marker=marker, facecolor=face, edgecolor=COLOURS[way], label=f"{way}, {moment} step")
    axes.plot([0, 100], [0, 100], color=GREY, linestyle=":")
    axes.set(xlabel="predicted to stay, % of weights", ylabel="seen to stay, % of weights")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0, fontsize=8)
    save(figure, "shares.png")

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    measures = (("peak memory", "peak bytes"), ("steady memory", "steady bytes"), ("throughput", "tokens/s"))
    base = {key: statistics.mean(float(row[key]) for lr in rates for row in rows["bf16 storage", lr]) for _, key in measures}
    for index, way in enumerate(ways):
        values = [statistics.mean(float(row[key]) for lr in rates for row in rows[way, lr]) / base[key] for _, key in measures]
        bars = axes.bar([x + 0.26 * (index - 1) for x in range(3)], values, 0.24, color=COLOURS[way], label=way)
        axes.bar_label(bars, fmt="%.2f", fontsize=9, color=GREY)
    axes.set_xticks(range(3), [name for name, _ in measures])
    axes.set(ylabel="ratio to bf16 storage", ylim=(0, 2.3))
    axes.legend(framealpha=0)
    save(figure, "cost.png")


def compute_dtype() -> None:
    """Throughput and peak memory of one Llama, by storage and compute dtype."""
    with (HERE / "compute.csv").open() as file:
        rows = {(row["shape"], row["way"]): row for row in csv.DictReader(file) if row["experiment"] == "cost"}
    shapes = ["plain", "checkpointing", "torch.compile(model)"]
    ways = {"off": "bf16 storage", "on": "on: computed in fp32", "on, own autocast": "on, own autocast", "mixed": "mixed"}
    figure, both = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, key, label, scale in zip(
        both, ("tokens_per_s", "peak_gib"), ("thousands of tokens/s", "peak memory, GiB"), (1e-3, 1), strict=True
    ):
        for index, (way, name) in enumerate(ways.items()):
            values = [scale * float(rows[shape, way][key]) for shape in shapes]
            places = [x + 0.2 * (index - 1.5) for x in range(len(shapes))]
            bars = axes.bar(
                places, values, 0.19, color=f"{0.15 + 0.22 * index:.2f}", hatch=["", "//", "", ".."][index], label=name
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8, color=GREY)
        axes.set_xticks(range(len(shapes)), shapes, fontsize=9)
        axes.set(ylabel=label)
        axes.legend(framealpha=0, fontsize=8)
    save(figure, "compute.png")


if __name__ == "__main__":
    main()
    compute_dtype()
