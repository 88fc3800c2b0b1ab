"""Draw the pictures of docs/evidence.md from the CSV files in docs/evidence; ``docs/tables.py`` writes the tables beside them.

    python benchmarks/plots.py

Each way has a mark and a grey of its own, so that a print without colours tells them apart, and each axis says what is better.
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent.parent / "docs/evidence"
GREY = "#808080"  # reads on white and on black
# Okabe and Ito's colours for the colour-blind, from dark to light as greys, each with a mark.
STYLES = {
    "bf16 as is": ("#D55E00", "o"),
    "bf16 storage": ("#D55E00", "o"),
    "fp32, own autocast": ("#0072B2", "s"),
    "fp32 storage": ("#0072B2", "s"),
    "mixed": ("#56B4E9", "D"),
    "master_weights": ("#000000", "*"),
    "bf16 + Kahan": ("#009E73", "^"),
    "optimi AdamW, Kahan, Triton": ("#009E73", "^"),
    "FlashAdamW, 24 bits": ("#CC79A7", "v"),
    "FlashAdamW, 32 bits": ("#F0E442", "P"),
    "on": ("#999999", "X"),
}
OTHERS = ("#999999", "h")
pyplot.rcParams.update(
    {
        "text.color": GREY,
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "font.size": 11,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.framealpha": 0,
        "figure.constrained_layout.use": True,
    }
)


def read(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file that measured something."""
    with (HERE / name).open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if not row.get("failed")]


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=150, transparent=True)
    pyplot.close(figure)


def draw_loss_by_rate() -> None:
    """loss.png: held-out loss against learning rate, with the spread over the seeds."""
    losses = defaultdict(list)
    for row in read("finetune.csv"):
        losses[row["way"], float(row["lr"])].append(float(row["loss after"]))
    ways = list(dict.fromkeys(way for way, _ in losses))
    rates = sorted({lr for _, lr in losses})
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for number, way in enumerate(ways):
        means = [statistics.mean(losses[way, lr]) for lr in rates]
        below = [mean - min(losses[way, lr]) for mean, lr in zip(means, rates, strict=True)]
        above = [max(losses[way, lr]) - mean for mean, lr in zip(means, rates, strict=True)]
        colour, mark = STYLES.get(way, OTHERS)
        # Two of the lines lie on each other: the later ones are thinner and broken, and leave the one beneath to be seen.
        line = {"linestyle": ["-", "-", "--"][number % 3], "linewidth": [2, 5, 2][number % 3]}
        axes.errorbar(
            rates,
            means,
            [below, above],
            color=colour,
            marker=mark,
            markersize=9,
            markeredgecolor="white",
            label=way,
            capsize=3,
            **line,
        )
    before = float(read("finetune.csv")[0]["loss before"])
    axes.axhline(before, color=GREY, linestyle=":", label="before fine-tuning")
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss after 300 steps\nnats a byte (lower is better)")
    axes.legend()
    save(figure, "loss.png")


def draw_shares() -> None:
    """shares.png: the share of weights that a step leaves as they are, estimated against seen."""
    rows = [row for row in read("finetune.csv") if row["way"] == "bf16 storage"]
    figure, axes = pyplot.subplots(figsize=(5, 4.5))
    for moment, mark, colour in (("first", "o", "#000000"), ("middle", "D", "#999999"), ("last", "s", "#D55E00")):
        estimated = [100 * float(row[f"predicted {moment}"]) for row in rows]
        seen = [100 * float(row[f"seen {moment}"]) for row in rows]
        axes.scatter(estimated, seen, marker=mark, facecolor="none", edgecolor=colour, label=f"{moment} step")
    axes.plot([0, 100], [0, 100], color=GREY, linestyle=":", label="estimated = seen")
    axes.set(xlabel="estimated, % of weights that stay", ylabel="seen, % of weights that stay")
    axes.legend(fontsize=9)
    save(figure, "shares.png")


def ratios_of_speed() -> dict[str, list[float]]:
    """For each way its tokens/s beside those of bf16 as is, in each run."""
    speeds: dict[str, dict[str, float]] = defaultdict(dict)
    for row in read("compute.csv"):
        if row["experiment"] in ("cost", "cost again") and row["shape"] == "plain":
            speeds[row["lend"]][row["way"]] = float(row["tokens_per_s"])
    ratios = defaultdict(list)
    for of_way in speeds.values():
        for way, speed in of_way.items():
            ratios[way].append(speed / of_way["bf16 as is"])
    return ratios


def mean_and_spread(values: list[float]) -> tuple[float, list[list[float]]]:
    """The mean, and how far the lowest and the highest lie from it, as error bars want it."""
    mean = statistics.mean(values)
    return mean, [[mean - min(values)], [max(values) - mean]]


def draw_loss_by_speed() -> None:
    """tradeoff.png: held-out loss after 300 steps against tokens/s, one mark a way."""
    losses = defaultdict(list)
    for row in read("compute.csv"):
        if row["experiment"] == "loss after 300 steps":
            losses[row["way"]].append(float(row["loss_held_out"]))
    speeds = ratios_of_speed()
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for way, its in losses.items():
        speed, speed_spread = mean_and_spread(speeds[way])
        loss, loss_spread = mean_and_spread(its)
        colour, mark = STYLES.get(way, OTHERS)
        axes.errorbar(
            speed,
            loss,
            loss_spread,
            speed_spread,
            color=colour,
            marker=mark,
            markersize=12,
            capsize=4,
            linestyle="none",
            label=f"{way}: {len(its)} seeds, {len(speeds[way])} runs",
        )
    axes.set(
        xlabel="tokens/s at 8 x 1024, as a ratio to bf16 as is (more is better)",
        ylabel="held-out loss after 300 steps\nnats a byte (lower is better)",
    )
    axes.margins(0.15)
    axes.legend()
    save(figure, "tradeoff.png")


def draw_cost() -> None:
    """compute.png: throughput and peak memory of one Llama, by way and shape."""
    rows = {(row["shape"], row["way"]): row for row in read("compute.csv") if row["experiment"] == "cost"}
    shapes = list(dict.fromkeys(shape for shape, way in rows if (shape, "bf16 as is") in rows))
    ways = [way for way in STYLES if any((shape, way) in rows for shape in shapes)]
    figure, both = pyplot.subplots(2, 1, figsize=(8, 7))
    measures = (
        ("tokens_per_s", "thousands of tokens/s\n(more is better)", 1e-3),
        ("peak_gib", "peak memory, GiB\n(less is better)", 1.0),
    )
    width = 0.8 / len(ways)
    for axes, (key, label, scale) in zip(both, measures, strict=True):
        for index, way in enumerate(ways):
            places = [place for place, shape in enumerate(shapes) if (shape, way) in rows]
            values = [scale * float(rows[shapes[place], way][key]) for place in places]
            left = [place + width * (index - (len(ways) - 1) / 2) for place in places]
            hatch = ["", "//", "..", "\\\\", "xx", "--", "oo"][index % 7]
            bars = axes.bar(left, values, 0.9 * width, color=STYLES[way][0], edgecolor="white", hatch=hatch, label=way)
            axes.bar_label(bars, fmt="%.0f", fontsize=8, color=GREY)
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set(ylabel=label)
    both[0].legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    save(figure, "compute.png")


if __name__ == "__main__":
    draw_loss_by_rate()
    draw_shares()
    draw_loss_by_speed()
    draw_cost()
