"""How long ``python -m precision_policy`` takes for a checkpoint of 14 GB, to twice ``cat`` plus the import of torch.

    python benchmarks/checkpoint.py [--gigabytes 14] [--rounds 5]

The files have to fit in the page cache beside 2 GB: all is read from there. Ratios within one run are what counts.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD = 3.5e9  # bytes, about what model hubs use
MATRIX = (4096, 11008)


def make(folder: Path, gigabytes: float) -> int:
    """Shards of normal matrices of different scales; gives back their bytes."""
    size = MATRIX[0] * MATRIX[1] * 2
    count = round(gigabytes * 1e9 / size)
    matrix = torch.randn(MATRIX).mul_(0.02)
    per_shard = max(1, int(SHARD / size))
    for first in range(0, count, per_shard):
        indices = range(first, min(first + per_shard, count))
        save_file({f"w{i}": (matrix * (1 + i / count)).bfloat16() for i in indices}, folder / f"{first:05d}.safetensors")
    return count * size


def seconds(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=14)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        total = make(Path(folder), given.gigabytes)
        files = [str(file) for file in sorted(Path(folder).iterdir())]
        seconds("cat", *files)  # warms the cache
        ratios = []
        for _ in range(given.rounds):
            cat, torch_alone = seconds("cat", *files), seconds(sys.executable, "-c", "import torch")
            command = seconds(sys.executable, "-m", "precision_policy", folder)
            ratios.append(command / (2 * cat + torch_alone))
            print(f"cat {cat:.2f} s, import torch {torch_alone:.2f} s, the command {command:.2f} s", flush=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"{total / 1e9:.1f} GB: {statistics.median(ratios):.2f} times twice cat and the import of torch")
        print(f"from {min(ratios):.2f} to {max(ratios):.2f}; peak memory, mapped pages included, {peak:.2f} GiB")


if __name__ == "__main__":
    main()
