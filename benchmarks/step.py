"""What master weights cost an optimizer's step, beside the same step as is and on fp32 storage; ratios within one run.

``python benchmarks/step.py [FOLDER]``: on a GPU where there is one, else on a CPU. Rows are added to ``step.csv`` in the folder.
"""

import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from precision_policy import keep_master_weights

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROUNDS = 15
SHAPES = {
    "one tensor of 2^26": [(2**26,)],
    "64 tensors of 2^20": [(1024, 1024)] * 64,
    "10,000 small tensors": [(100,), (30, 40)] * 5_000,
}
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=1e-5, foreach=True),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9, foreach=True),
}


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype, kind: str) -> torch.optim.Optimizer:
    """An optimizer over parameters with gradients."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 0.01
    return OPTIMIZERS[kind](params)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, float]:
    """The median time of a step in seconds, the ways taking turns so that noise is shared."""
    times: dict[str, list[float]] = {way: [] for way in optimizers}
    for number in range(ROUNDS + 2):
        for way, optimizer in optimizers.items():
            wait()
            start = time.perf_counter()
            optimizer.step()
            wait()
            if number >= 2:
                times[way].append(time.perf_counter() - start)
    return {way: statistics.median(taken) for way, taken in times.items()}


def memory(shapes: list[tuple[int, ...]], kind: str, keeps: bool) -> float:
    """Bytes an element at the peak of two steps."""
    gc.collect()  # optimizers of before are in cycles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = make(shapes, torch.bfloat16, kind)
    if keeps:
        keep_master_weights(optimizer)
    optimizer.step()
    optimizer.step()
    return (torch.cuda.max_memory_allocated() - before) / sum(torch.Size(shape).numel() for shape in shapes)


COLUMNS = ["device", "tensors", "optimizer", "as_is_ms", "fp32_ms", "masters_ms", "as_is_bytes", "masters_bytes"]


def add(row: dict[str, str]) -> None:
    """Add a row to the file, where one was named."""
    if len(sys.argv) > 1:
        device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
        path = Path(sys.argv[1], "step.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow({"device": device, **row})


def main() -> None:
    print(torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads", torch.__version__)
    for name, shapes in SHAPES.items():
        for kind in OPTIMIZERS:
            kept = make(shapes, torch.bfloat16, kind)
            keep_master_weights(kept)
            ways = {
                "bf16 as is": make(shapes, torch.bfloat16, kind),
                "fp32": make(shapes, torch.float32, kind),
                "masters": kept,
            }
            times = measure(ways)
            told = {"as_is_ms": "bf16 as is", "fp32_ms": "fp32", "masters_ms": "masters"}
            add({"tensors": name, "optimizer": kind, **{key: f"{1000 * times[way]:.2f}" for key, way in told.items()}})
            print(
                f"{name:22}{kind:16}"
                + "".join(f"{way} {1000 * taken:8.2f} ms  " for way, taken in times.items())
                + f"masters: {times['masters'] / times['bf16 as is']:.2f} of bf16 as is, {times['masters'] / times['fp32']:.2f} of fp32",
                flush=True,
            )
    if CUDA:
        for shapes in ([(2**29,)], [(2**20,)] * 512):
            for kind in OPTIMIZERS:
                as_is, kept = memory(shapes, kind, keeps=False), memory(shapes, kind, keeps=True)
                size = {"as_is_bytes": f"{as_is:.2f}", "masters_bytes": f"{kept:.2f}"}
                add({"tensors": f"{len(shapes)} of {shapes[0][0]:,}", "optimizer": kind, **size})
                print(f"peak of {len(shapes)} tensors, {kind}: {as_is:.2f} bytes an element as is, {kept:.2f} with masters")


if __name__ == "__main__":
    main()
