"""Fine-tune one bf16 checkpoint as is and with the policy, over three seeds, and show in a table what became of it.

``python demo.py FOLDER [STEPS]``; what the jobs write goes to the folder. They run two at a time, each in one thread.
"""

import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
CHECKPOINT = HERE / "finetune/checkpoint/model.safetensors"
SEEDS = 3


@dataclass
class Run:
    """One line of the table: an application, and the words that are added to its command line."""

    application: str
    option: str


RUNS = [
    Run("finetune", ""),
    Run("finetune", "+precision_policy=master_weights"),
    Run("finetune", "+precision_policy=mixed"),
    Run("in_code", ""),
    Run("in_code", "+precision_policy=master_weights"),
]
TITLES = {
    "finetune": "finetune/train.py: the config names model and optimizer",
    "in_code": "in_code/train.py: both are built in code, the config holds numbers",
}


def start(run: Run, folder: Path, steps: str) -> str:
    """Run an application once for each seed, as a sweep of Hydra's; its output, which is shown as well."""
    seeds = ",".join(str(seed) for seed in range(SEEDS))
    options = [run.option] if run.option else []
    command = ["train.py", "--multirun", *options, f"seed={seeds}", f"steps={steps}"]
    finished = subprocess.run(
        [sys.executable, *command, f"hydra.sweep.dir={folder}"],
        cwd=HERE / run.application,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    shown = "".join(f"  {line}\n" for line in finished.stdout.splitlines())
    print(f"\n{run.application}$ python {' '.join(command)}\n{shown}", end="", flush=True)
    if finished.returncode != 0:
        sys.exit(f"{run.application}/train.py failed")
    return finished.stdout


def share_changed(folder: Path) -> float:
    """The share of stored weights that differ from the checkpoint's, in the mean over the seeds."""
    before = load_file(CHECKPOINT)
    total = SEEDS * sum(tensor.numel() for tensor in before.values())
    changed = 0
    for seed in range(SEEDS):
        after = load_file(folder / str(seed) / "model/model.safetensors")
        for name, tensor in before.items():
            changed += int(torch.count_nonzero(after[name].float() != tensor.float()))
    return changed / total


def make_line(run: Run, folder: Path, output: str) -> str:
    """What one line of the table says."""
    before = [float(loss) for loss in re.findall(r"loss before: ([\d.]+)", output)]
    after = [float(loss) for loss in re.findall(r"loss after: ([\d.]+)", output)]
    spread = (max(after) - min(after)) / 2
    name = run.option or "as is"
    return (
        f"  {name:<33} {share_changed(folder):>14.1%} {statistics.mean(before):>12.4f} "
        f"{statistics.mean(after):>12.4f} ± {spread:.4f}"
    )


def main(work: Path, steps: str = "100") -> None:
    folders = [work / f"run-{number}" for number in range(len(RUNS))]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(start, RUNS, folders, [steps] * len(RUNS)))
    print(f"\n{'':<35} {'stored weights':>14} {'held-out loss':>12}")
    print(f"{'':<35} {'that changed':>14} {'before':>12} {'after':>12}")
    shown = ""
    for run, folder, output in zip(RUNS, folders, outputs, strict=True):
        if run.application != shown:
            print(TITLES[run.application])
        shown = run.application
        print(make_line(run, folder, output))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
