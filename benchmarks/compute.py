"""What each way to train costs, and what loss it ends at, on an application that knows nothing of the policy.

    python benchmarks/compute.py [batch=4 ...] --out DIRECTORY [--only WORD ...] [--devices 0,1]   # a Llama of 1.1 B, on GPUs
    python benchmarks/compute.py --out DIRECTORY --small                                           # a tiny one, on a CPU

Each row is one job, run as its user would run it, in a process of its own. The processes are forked from this one, which has
imported torch and transformers, so that a row on a lent GPU is not mostly imports.
"""

import argparse
import csv
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# Asks the driver's library and not CUDA, which a forked process could not use any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

WAYS = {
    "bf16 as is": ["+precision_policy=off"],
    "on": ["+precision_policy=on"],
    "fp32, own autocast": ["+precision_policy=on", "autocast=true"],
    "fp32, own autocast, no cache": ["+precision_policy=on", "autocast=uncached"],
    "mixed": ["+precision_policy=mixed"],
    "master_weights": ["+precision_policy=master_weights"],
}
COMPARED = ("bf16 as is", "fp32, own autocast", "master_weights")
RIVALS = {
    "optimi AdamW, Kahan, Triton": ["optimizer._target_=optimi.AdamW", "~optimizer.fused", "+optimizer.triton=true"],
    "FlashAdamW, 24 bits": ["optimizer._target_=flashoptim.FlashAdamW", "~optimizer.fused", "+optimizer.master_weight_bits=24"],
    "FlashAdamW, 32 bits": ["optimizer._target_=flashoptim.FlashAdamW", "~optimizer.fused", "+optimizer.master_weight_bits=32"],
}
SHAPES = {
    "plain": [],
    "checkpointing": ["checkpointing=true"],
    "torch.compile(model)": ["compile=wrapper"],
}
# Of a step of the runs whose loss is compared: fifteen of them fit into some minutes of a GPU.
SMALLER = ["batch=4", "length=512"]
# Other optimizers and settings. SGD and amsgrad are torch's own step, between a join and a split of the bits.
OTHERS = {
    "SGD, momentum": ["optimizer._target_=torch.optim.SGD", "+optimizer.momentum=0.9", "optimizer.fused=false"],
    "AdamW, foreach": ["optimizer.fused=false", "+optimizer.foreach=true"],
    "AdamW, amsgrad": ["+optimizer.amsgrad=true"],
}
COMPUTED = {"bf16 as is": "", "on": "fp32", "master_weights": ""}
"""What the first step says of the compute dtype; bf16 where a way is not named."""


@dataclass
class Row:
    """One job to run."""

    experiment: str
    shape: str
    way: str
    arguments: list[str]
    ranks: int = 1

    @property
    def name(self) -> str:
        return f"{self.experiment} {self.shape} {self.way}"


def rows() -> list[Row]:
    """All rows, in the order in which they are worth a GPU's time."""
    listed = []
    for shape in ("plain", "checkpointing"):
        listed += rows_of_shape(shape)
        for way, optimizer in RIVALS.items():
            listed.append(Row("cost", shape, way, [*SHAPES[shape], *WAYS["bf16 as is"], *optimizer, "steps=20"]))
    for parallel in ("ddp", "fsdp2"):
        for way in ("bf16 as is", "mixed", "master_weights"):
            listed.append(Row("two GPUs", parallel, way, [f"parallel={parallel}", *WAYS[way], "steps=20"], ranks=2))
    listed += rows_of_losses()
    listed += rows_of_shape("torch.compile(model)")
    for name, optimizer in OTHERS.items():
        for way in ("bf16 as is", "master_weights"):
            listed.append(Row("other optimizers", name, way, [*optimizer, *WAYS[way], "steps=20"]))
    for shape, flags in SHAPES.items():
        for way in ("fp32, own autocast", "fp32, own autocast, no cache", "mixed"):
            listed.append(Row("autocast's cache", shape, way, [*flags, *WAYS[way], "steps=20"]))
        for way in ("on", "mixed"):
            listed.append(Row("fp32 compute", shape, way, [*flags, *WAYS[way], "steps=6"]))
    return listed


def rows_of_losses() -> list[Row]:
    """The loss after 300 steps: three seeds of each way."""
    compared = {way: WAYS[way] for way in COMPARED}
    for rival in ("optimi AdamW, Kahan, Triton", "FlashAdamW, 24 bits"):
        compared[rival] = [*WAYS["bf16 as is"], *RIVALS[rival]]
    listed = []
    for seed in (0, 1, 2):
        for way, options in compared.items():
            listed.append(Row("loss after 300 steps", "4 x 512", way, [*options, *SMALLER, f"seed={seed}", "steps=300"]))
    return listed


def rows_of_shape(shape: str) -> list[Row]:
    """What one shape costs in each of the ways that a user chooses from."""
    return [Row("cost", shape, way, [*SHAPES[shape], *WAYS[way], "steps=20"]) for way in COMPARED]


def small_rows() -> list[Row]:
    """The rows that a CPU can do: what they say is looked at, not how long they take."""
    size = ["batch=4", "length=64", "steps=6", "optimizer.fused=null"]
    return [
        Row("cost", shape, way, [*SHAPES[shape], *WAYS[way], *size]) for shape in ("plain", "checkpointing") for way in WAYS
    ]


class Job:
    """A row that runs, in a forked process for each rank.

    Args:
        row: what to run.
        checkpoint: where the model lies.
        devices: GPUs by number, one for each rank.
    """

    def __init__(self, row: Row, checkpoint: Path, devices: list[str]) -> None:
        self.row = row
        self.devices = devices
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output")
        arguments = [f"model.pretrained_model_name_or_path={checkpoint}", *row.arguments, f"hydra.run.dir={self._folder.name}"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.children = set()
        for rank in range(row.ranks):
            child = os.fork()
            if child == 0:
                if row.ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(row.ranks)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                become_the_job(arguments, self._output, ",".join(devices))
            self.children.add(child)

    def result(self) -> dict:
        """What it measured and what the policy said."""
        text = self._output.read_text()
        self._folder.cleanup()
        row = self.row
        named = {
            "lend": 1,
            "experiment": row.experiment,
            "shape": row.shape,
            "way": row.way,
            "arguments": " ".join(row.arguments),
        }
        found = re.search(r"^RESULT (.*)$", text, re.MULTILINE)
        if found is None:
            print(text[-3000:], flush=True)
            return {**named, "failed": text.strip().splitlines()[-1] if text.strip() else "no output"}
        told = re.search(r"trainable tensors.*: (stored in .*)", text)
        warned = "slower than in bf16" in text
        return {**named, **json.loads(found[1]), "told": told[1] if told else "", "warned": warned}


def run_all(wanted: list[Row], checkpoint: Path, devices: list[str]) -> Iterator[dict]:
    """Run rows, one on each GPU at a time, and give each result when it is there.

    No thread waits for them: a process with threads must not fork.
    """
    waiting, free, running = list(wanted), list(devices), []
    while waiting or running:
        if waiting and len(free) >= waiting[0].ranks:
            row = waiting.pop(0)
            its, free = free[: row.ranks], free[row.ranks :]
            running.append(Job(row, checkpoint, its))
            continue
        child, _ = os.wait()
        for job in list(running):
            job.children.discard(child)
            if not job.children:
                running.remove(job)
                free += job.devices
                yield job.result()


def become_the_job(arguments: list[str], output: Path, devices: str) -> None:
    """Be the application's process; it never returns."""
    status = 1
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.argv = ["llama_app.py", *arguments]
        sys.path[0] = str(HERE)
        runpy.run_path(str(HERE / "llama_app.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="made where it is not there")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name has one of these words")
    parser.add_argument(
        "--devices", default="0", help="GPUs by number; each runs one job at a time, and all of them those of ranks"
    )
    parser.add_argument("override", nargs="*", help="for the application, such as batch=4")
    given = parser.parse_intermixed_args()
    file = given.out / ("compute-small.csv" if given.small else "compute.csv")
    if file.exists():
        parser.error(f"{file} is there: remove it, or give another folder")
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint = given.checkpoint or given.out / "checkpoint"
    if not (checkpoint / "config.json").exists():
        extra = ["--small", "--steps", "20"] if given.small else ["--steps", "100"]
        subprocess.run([sys.executable, str(HERE / "llama_checkpoint.py"), str(checkpoint), *extra], check=True)
    import torch  # noqa: F401 - imported for the jobs, which are forks of this process
    import transformers.models.llama.modeling_llama  # noqa: F401 - as above

    every = small_rows() if given.small else rows()
    wanted = [row for row in every if not given.only or any(word in row.name for word in given.only)]
    for row in wanted:
        row.arguments += given.override
    devices = given.devices.split(",")
    results: list[dict] = []
    for result in run_all([row for row in wanted if row.ranks <= len(devices)], checkpoint, devices):
        results.append(result)
        print(json.dumps(result), flush=True)
        write(results, file)
    if given.small:
        check(results)


def write(results: list[dict], file: Path) -> None:
    """All rows so far, one column for each key."""
    columns = list(dict.fromkeys(key for one in results for key in one))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(results)


def check(results: list[dict]) -> None:
    """On a CPU: what was told of the compute dtypes is what each row asked for."""
    for one in results:
        computed = re.search(r"computed in (\w+)", one["told"])
        expected = COMPUTED.get(one["way"], "bf16")
        if expected == "fp32":
            # What is not known is not said.
            assert computed is None or computed[1] == "fp32", one
        elif expected:
            assert computed is not None, one
            assert computed[1] == expected, one
        if one["way"] == "master_weights":
            assert "updated in fp32 by master weights" in one["told"], one
    print("compute dtypes as expected")


if __name__ == "__main__":
    main()
