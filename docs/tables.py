"""Write the tables of the pages from the CSV files in ``docs/evidence``, or check with ``--check`` that they are as written.

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; NAME is a key of ``TABLES``. Nothing is typed
by hand there.
"""

import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs/evidence"
END = "<!-- end of figures -->"
NOT_YET = "*Not measured yet.*"
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of a CSV file that measured something."""
    with (EVIDENCE / name).open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if not row.get("failed")]


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def number(row: Row, key: str) -> float:
    """A cell as a number."""
    return float(row[key])


def mean_of(rows: list[Row], key: str) -> float:
    """The mean of a column, over the rows that have it; NaN where none has."""
    values = [number(row, key) for row in rows if row[key]]
    return statistics.mean(values) if values else float("nan")


def rounded(value: float, digits: int) -> str:
    """A number for a cell; nothing where it was not measured."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def with_spread(rows: list[Row], key: str, digits: int) -> str:
    """The mean of a column, and what lies farthest from it on either side."""
    values = [number(row, key) for row in rows]
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one run)"
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def of_experiment(experiment: str) -> dict[tuple[str, str], list[Row]]:
    """The rows of an experiment of ``benchmarks/compute.py``, by shape and way."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in read("compute.csv"):
        if row["experiment"] == experiment:
            found[row["shape"], row["way"]].append(row)
    return found


def compare(experiment: str, to: str) -> str:
    """Throughput, peak memory and the optimizer's step, by shape and way; ratios to one way of the same shape."""
    found = of_experiment(experiment)
    if not found:
        return NOT_YET
    shapes = list(dict.fromkeys(shape for shape, _ in found))
    lines = []
    for (shape, way), rows in sorted(found.items(), key=lambda item: shapes.index(item[0][0])):
        base = mean_of(found[shape, to], "tokens_per_s") if (shape, to) in found else float("nan")
        speed = mean_of(rows, "tokens_per_s")
        cells = [rounded(speed / 1000, 1), rounded(speed / base, 3), rounded(mean_of(rows, "peak_gib"), 1)]
        lines.append([shape, way, *cells, rounded(mean_of(rows, "optimizer_ms"), 1)])
    head = ["shape", "way", "thousands of tokens/s", f"ratio to {to}", "peak GiB", "optimizer's step, ms"]
    return table(head, lines)


def cost() -> str:
    """What each way costs."""
    return compare("cost", "bf16 as is")


def machines() -> str:
    """What each way reaches of the tokens/s of bf16 as is, run by run: how far two runs differ."""
    found: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in read("compute.csv"):
        if row["experiment"] in ("cost", "cost again"):
            found[row["lend"], row["device"], row["shape"]][row["way"]] = row
    ways = list(dict.fromkeys(way for of_way in found.values() for way in of_way if way != "bf16 as is"))
    lines = []
    for (lend, device, shape), of_way in found.items():
        base = number(of_way["bf16 as is"], "tokens_per_s")
        ratios = [f"{number(of_way[way], 'tokens_per_s') / base:.3f}" if way in of_way else "" for way in ways]
        lines.append([f"{device}, run {lend}", shape, *ratios])
    return table(["machine", "shape", *ways], lines)


def other_optimizers() -> str:
    """Master weights of other classes, and with other settings."""
    return compare("other optimizers", "bf16 as is")


def fp32_compute() -> str:
    """What it costs to compute in fp32 what is stored in it."""
    return compare("fp32 compute", "mixed")


def cache() -> str:
    """What autocast costs without its cache of weights."""
    return compare("autocast's cache", "fp32, own autocast")


def two_gpus() -> str:
    """What each way costs on two GPUs."""
    return compare("two GPUs", "bf16 as is")


def step() -> str:
    """What the optimizer's step alone takes."""
    lines = []
    for row in read("step.csv"):
        if row["masters_ms"]:
            times = [f"{number(row, key):.1f}" for key in ("as_is_ms", "fp32_ms", "masters_ms")]
            ratios = [f"{number(row, 'masters_ms') / number(row, key):.1f}" for key in ("as_is_ms", "fp32_ms")]
            lines.append([row["device"], row["tensors"], row["optimizer"], *times, *ratios])
    head = ["device", "tensors", "optimizer", "bf16 as is, ms", "fp32, ms", "master_weights, ms", "to bf16 as is", "to fp32"]
    return table(head, lines)


def peaks() -> str:
    """The peak of memory of two steps, over tensors that are in memory with their gradients."""
    lines = []
    for row in read("step.csv"):
        if row["masters_bytes"]:
            cells = [f"{number(row, key):.1f}" for key in ("as_is_bytes", "masters_bytes")]
            lines.append([row["tensors"], row["optimizer"], *cells])
    return table(["tensors", "optimizer", "bf16 as is, bytes an element", "master_weights, bytes an element"], lines)


def loss() -> str:
    """Held-out loss after 300 steps."""
    lines = []
    for (shape, way), rows in of_experiment("loss after 300 steps").items():
        cells = [with_spread(rows, "loss_held_out", 3), with_spread(rows, "loss_last", 3)]
        lines.append([f"{shape}, {rows[0]['device']}", way, str(len(rows)), *cells])
    head = ["tokens a step", "way", "seeds", "held-out loss (lowest to highest)", "loss of the last five training steps"]
    return table(head, lines)


def machine() -> str:
    """Which cards and model the costs were measured with."""
    rows = [row for row in read("compute.csv") if row["experiment"] == "cost"]
    devices = " and one ".join(sorted({row["device"] for row in rows}))
    return f"One {devices}; a Llama of {int(rows[0]['parameters']):,} parameters, 8 x 1024 tokens a step, lr 1e-5."


def ranks() -> str:
    """Throughput and peak memory on several GPUs; ratios to the first row of the same kind."""
    rows = [row for row in read("ranks.csv") if row["tokens_per_s"]]
    base: dict[str, Row] = {}  # the first row of each
    lines = []
    for row in rows:
        if row["policy"].startswith("insists"):
            continue
        of = base.setdefault(row["way"], row)
        speed = number(row, "tokens_per_s") / 1000
        ratio = number(row, "tokens_per_s") / number(of, "tokens_per_s")
        lines.append([row["way"].upper(), row["policy"], f"{speed:.1f}", f"{ratio:.2f}", f"{number(row, 'peak_gib'):.1f}"])
    return table(
        ["parallel by", "option", "thousands of tokens/s of a rank", "ratio to the first", "peak GiB of a rank"], lines
    )


def of_rates() -> dict[tuple[str, float], list[Row]]:
    """The rows of ``benchmarks/finetune.py``, by way and learning rate."""
    found: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in read("finetune.csv"):
        found[row["way"], float(row["lr"])].append(row)
    return found


def rates() -> str:
    """Held-out loss by learning rate."""
    found = of_rates()
    ways = list(dict.fromkeys(way for way, _ in found))
    learning_rates = sorted({lr for _, lr in found}, reverse=True)
    lines = [[f"{lr:g}", *[with_spread(found[way, lr], "loss after", 3) for way in ways]] for lr in learning_rates]
    return table(["lr", *ways], lines)


def shares() -> str:
    """The share of bf16 weights that a step leaves as they are: what was estimated before it, and what was seen."""
    found = of_rates()
    keys = ("predicted first", "seen first", "seen middle", "seen last")
    lines = []
    for lr in sorted({lr for _, lr in found}, reverse=True):
        rows = found["bf16 storage", lr]
        lines.append([f"{lr:g}", *[f"{100 * mean_of(rows, key):.1f} %" for key in keys]])
    return table(["lr", "estimated before the first step", "seen: first step", "middle step", "last step"], lines)


def small_cost() -> str:
    """Memory and throughput of the small model."""
    found = of_rates()
    ways = list(dict.fromkeys(way for way, _ in found))
    of_way = {way: [row for (its, _), rows in found.items() if its == way for row in rows] for way in ways}
    lines = []
    for way, rows in of_way.items():
        speeds = [number(row, "tokens/s") / 1000 for row in rows]
        peak = mean_of(rows, "peak bytes") / mean_of(of_way[ways[0]], "peak bytes")
        speed = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        lines.append([way, speed, f"{peak:.2f}"])
    return table(["way", "thousands of tokens/s, median (lowest to highest)", f"peak memory, ratio to {ways[0]}"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "cost": cost,
    "machines": machines,
    "two GPUs": two_gpus,
    "step": step,
    "peaks": peaks,
    "other optimizers": other_optimizers,
    "fp32 compute": fp32_compute,
    "cache": cache,
    "loss": loss,
    "machine": machine,
    "ranks": ranks,
    "rates": rates,
    "shares": shares,
    "small cost": small_cost,
}


def written(page: str) -> str:
    """A page with its tables as they are today."""
    parts = page.split("<!-- figures: ")
    pieces = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition(" -->")
        behind = rest.partition(END)[2]
        pieces.append(f"{name} -->\n{TABLES[name]()}\n{END}{behind}")
    return "<!-- figures: ".join(pieces)


def main() -> None:
    """Write, or check."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page = path.read_text(encoding="utf-8")
        today = written(page)
        if page == today:
            continue
        stale.append(path.name)
        if "--check" not in sys.argv:
            path.write_text(today, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"not as docs/evidence has it: {', '.join(stale)}; run `make tables`")
    print(f"tables written anew on {', '.join(stale)}" if stale else "tables: as docs/evidence has it")


if __name__ == "__main__":
    main()
