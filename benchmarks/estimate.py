"""The estimate's time and memory, as ratios to reading the same bytes once and to cloning and comparing the parameters.

python benchmarks/estimate.py [--elements 100000000] [--out FILE]
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout's package, where none is installed

from precision_policy.estimate.histogram import histogram


def seconds(work, on_gpu: bool, repeats: int = 15) -> tuple[float, float]:
    """Median and spread (interquartile range) of a piece of work."""
    times = []
    for number in range(repeats + 3):
        begun = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begun)
    quarter = statistics.quantiles(times, n=4)
    return statistics.median(times), quarter[2] - quarter[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    weights = torch.empty(given.elements, dtype=torch.bfloat16, device=device)
    for chunk in weights.split(1 << 26):
        chunk.copy_(torch.randn(chunk.numel(), device=device) * 0.02)

    def clone_and_compare() -> None:
        before = weights.clone()
        int(torch.count_nonzero(weights != before))

    ways = {
        "read once": lambda: weights.view(torch.int64).sum(),
        "estimate": lambda: histogram([weights], torch.bfloat16),
        "clone and compare": clone_and_compare,
    }
    rows = []
    for name, work in ways.items():
        extra = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            work()
            extra = torch.cuda.max_memory_allocated() - held
        median, spread = seconds(work, on_gpu)
        rows.append({"way": name, "seconds": median, "spread": spread, "extra bytes": extra})
    read = rows[0]["seconds"]
    print(
        f"{given.elements:,} bf16 elements on {torch.cuda.get_device_name() if on_gpu else 'the CPU'}, torch {torch.__version__}"
    )
    for row in rows:
        row["ratio to reading"] = row["seconds"] / read
        memory = f"{row['extra bytes'] / (2 * given.elements):.1%} of the weights" if on_gpu else "-"
        print(
            f"{row['way']:<20}{1e3 * row['seconds']:>10.3f} ms +- {1e3 * row['spread']:<8.3f}{row['ratio to reading']:>8.2f} x  extra memory {memory}"
        )
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
