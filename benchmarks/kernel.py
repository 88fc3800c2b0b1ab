"""How fast the kernel of Adam's whole step is on a GPU, beside what a copy of memory reaches: the tensors of a Llama of 1.1 B.

``python benchmarks/kernel.py --out docs/evidence``
"""

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from precision_policy.job import kernels

BYTES = 26  # of an element that must move: states 16, values 4, low bits 4, gradient 2
LAYER = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632), (2048,), (2048,)]
SHAPES = [(32000, 2048), *LAYER * 22, (2048,), (32000, 2048)]
COPIED = 2**30
RATES = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "decoupled": True, "fused": True}


def milliseconds(work: Callable[[], object]) -> float:
    """The median of six runs on the device, after two."""
    work()
    work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(7)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(second) for first, second in itertools.pairwise(events))


def copy() -> float:
    """TB/s of a copy, bytes read and written."""
    source = torch.empty(COPIED, device="cuda")
    target = torch.empty_like(source)
    return 8 * COPIED / milliseconds(lambda: target.copy_(source)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    rows = [{"device": device, "what": "a copy", "ms": "", "TB_per_s": f"{copy():.2f}"}]
    values = [torch.randn(shape, device="cuda").mul_(0.02).bfloat16() for shape in SHAPES]
    gradients = [torch.randn(shape, device="cuda").mul_(0.01).bfloat16() for shape in SHAPES]
    lows = [torch.zeros_like(value) for value in values]
    exp_avgs = [torch.zeros(shape, device="cuda") for shape in SHAPES]
    exp_avg_sqs = [torch.full(shape, 1e-4, device="cuda") for shape in SHAPES]
    elements = sum(value.numel() for value in values)
    for warps in (4, 8):
        kernels._WARPS = warps  # of each program
        taken = milliseconds(lambda: kernels.adam(values, lows, gradients, exp_avgs, exp_avg_sqs, count=3, **RATES))
        rate = BYTES * elements / taken / 1e9
        rows.append({"device": device, "what": f"the kernel, {warps} warps", "ms": f"{taken:.2f}", "TB_per_s": f"{rate:.2f}"})
    with (given.out / "kernel.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
