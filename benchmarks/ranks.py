"""The policy on several ranks: one voice, whole counts, the right dtypes, and nobody hangs.

    torchrun --nproc-per-node 2 benchmarks/ranks.py --out docs/evidence            # any number of GPUs, NCCL
    torchrun --nproc-per-node 2 benchmarks/ranks.py --out /tmp/ranks --small       # gloo, on a CPU

Each rank starts its part of ``llama_app.py``, an application that knows nothing of the policy, once for each row.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
POLICIES = {
    "off": ["+precision_policy=off"],
    "on": ["+precision_policy=on"],
    "mixed": ["+precision_policy=mixed"],
    "strict": ["+precision_policy=strict", "+model.torch_dtype=bfloat16"],
    "insists on bf16": ["+precision_policy=on", "+model.torch_dtype=bfloat16"],
}
TIMED = ("off", "on", "mixed")
WAYS = ("ddp", "fsdp2")


def job(number: int, checkpoint: Path, arguments: list[str], timeout: float) -> tuple[int, str]:
    """This rank's part of one job: its exit status and output; -1 where it hung."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    environment["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1 + number)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "llama_app.py"), f"model.pretrained_model_name_or_path={checkpoint}"]
        command += [*arguments, f"hydra.run.dir={folder}"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            return -1, f"hung: {error}"
    return done.returncode, done.stdout + done.stderr


def row(way: str, policy: str, parts: list[tuple[int, str]], whole_share: float) -> dict:
    """One job as a row; what must hold on any number of ranks is asserted."""
    output = "\n".join(text for _, text in parts)
    statuses = [status for status, _ in parts]
    assert -1 not in statuses, f"{way} {policy}: a rank hung"
    records = re.findall(r"\[precision_policy\]\[(\w+)\] - (.*)", output)
    told = {level: [text for its, text in records if its == level] for level in ("INFO", "WARNING", "ERROR")}
    result = re.search(r"^RESULT (.*)$", output, re.MULTILINE)
    found = {"way": way, "policy": policy, "ranks": len(parts), **(json.loads(result[1]) if result else {})}
    if policy == "strict":
        assert all(statuses), f"{way} strict: a rank went on: {statuses}"
        return {**found, "told": "stopped on all ranks"}
    assert not any(statuses), output[-3000:]
    assert len(told["INFO"]) == {"off": 0}.get(policy, 2), told
    if policy in ("on", "mixed"):
        found["told"] = told["INFO"][1].partition(": ")[2]
        assert "stored in fp32" in found["told"]
        if way == "ddp":
            assert ("computed in bf16" if policy == "mixed" else "called under no autocast or mixed precision") in found["told"]
    if policy == "insists on bf16":
        assert len(told["WARNING"]) == 1, told
        share = float(re.search(r"([\d.]+)% of updates round away", told["WARNING"][0])[1])
        assert abs(share - whole_share) < 0.5, (share, whole_share)
        assert f"({found['parameters']:,} elements)" in output
        found["told"] = f"{share}% of the shard, {whole_share:.1f}% of the whole"
    return found


def checked(way: str, policy: str, parts: list[tuple[int, str]], whole_share: float) -> dict:
    """The row, or what did not hold: the other rows are wanted all the same."""
    try:
        return row(way, policy, parts, whole_share)
    except AssertionError as error:
        return {"way": way, "policy": policy, "ranks": len(parts), "failed": str(error)}


def write(rows: list[dict], file: Path) -> None:
    """All rows so far, one column for each key."""
    columns = list(dict.fromkeys(key for one in rows for key in one))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)


def ratios(rows: list[dict]) -> None:
    """Print what each policy costs, as ratios to off."""
    for way in WAYS:
        of = {one["policy"]: one for one in rows if one["way"] == way}
        for policy in TIMED[1:]:
            for key in ("tokens_per_s", "peak_gib"):
                if of["off"].get(key) and of[policy].get(key):  # no memory is told on a CPU
                    print(f"{way:<8}{policy:<8}{key:<14}{of[policy][key] / of['off'][key]:.2f} times that of off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="made where it is not there")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("override", nargs="*", help="for the application, such as batch=4")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    first = dist.get_rank() == 0
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint = given.checkpoint or given.out / "checkpoint"
    if first and not (checkpoint / "config.json").exists():
        small = ["--small", "--steps", "20"] if given.small else []
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        subprocess.run([sys.executable, str(HERE / "llama_checkpoint.py"), str(checkpoint), *small], check=True, env=alone)
    dist.barrier()
    from precision_policy.estimate.checkpoint import summarize

    counted = summarize(checkpoint).histograms.values() if first else []
    total = sum(histogram.total for histogram in counted)
    whole_share = 100 * sum(histogram.lost(1e-5) * histogram.total for histogram in counted) / max(total, 1)
    size = ["batch=2", "length=64", "steps=3", "optimizer.fused=null"] if given.small else ["steps=12"]
    file = given.out / ("ranks-small.csv" if given.small else "ranks.csv")
    rows: list[dict] = []

    def part(number: int, way: str, policy: str) -> tuple[int, str]:
        arguments = [f"parallel={way}", *size, *given.override, *POLICIES[policy]]
        return job(number, checkpoint, arguments, timeout=600 if cuda else 120)

    def gather(way: str, policy: str, mine: tuple[int, str]) -> None:
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        if first:
            rows.append(checked(way, policy, parts, whole_share))
            print(json.dumps(rows[-1]), flush=True)
            write(rows, file)

    every = [(way, policy) for way in WAYS for policy in POLICIES]
    timed = [one for one in every if one[1] in TIMED]
    for number, one in enumerate(timed):
        gather(*one, part(number, *one))
    # What is not timed runs side by side where there is room for it.
    others = [one for one in every if one not in timed]
    with ThreadPoolExecutor(len(others) if cuda else 1) as pool:
        for one, mine in zip(others, pool.map(lambda n: part(len(timed) + n, *others[n]), range(len(others))), strict=True):
            gather(*one, mine)
    if first:
        ratios(rows)
    dist.barrier()
    sys.stdout.flush()
    os._exit(int(any("failed" in one for one in rows)))  # torch takes gloo groups down badly


if __name__ == "__main__":
    main()
