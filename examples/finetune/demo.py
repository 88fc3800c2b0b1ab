"""Fine-tune one bf16 checkpoint as is, with ``+precision_policy=on`` and with ``=mixed``, and compare what came out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
MIXED = ("+precision_policy=mixed", ["+precision_policy=mixed"])


def run(*command: str) -> str:
    """Run a command, its output shown as it comes, and return that output."""
    print("\n$ python " + " ".join(command), flush=True)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        print("  " + line, end="", flush=True)
        lines.append(line)
    if process.wait() != 0:
        sys.exit(f"{command[0]} failed")
    return "".join(lines)


def row(name: str, before: dict[str, torch.Tensor], directory: Path, log: str) -> str:
    after = load_file(directory / "model.safetensors")
    changed = sum(int((after[key] != before[key].to(after[key].dtype)).sum()) for key in before)
    total = sum(tensor.numel() for tensor in before.values())
    dtype = str(next(iter(after.values())).dtype).removeprefix("torch.")
    told = re.search(r"computed in (\w+)", log)
    computed = told[1] if told else {"bfloat16": "bf16", "float32": "fp32"}[dtype]  # without autocast, what it is stored in
    losses = re.findall(r"loss (?:before|after): ([\d.]+)", log)
    return f"{name:<24} {dtype:<14} {computed:<14} {changed / total:>15.1%} {losses[0]:>12} {losses[1]:>11}"


def main(work: Path, steps: int, pretraining_steps: int) -> None:
    checkpoint = work / "checkpoint"
    if not (checkpoint / "model.safetensors").exists():
        run("make_checkpoint.py", str(checkpoint), str(pretraining_steps))
    before = load_file(checkpoint / "model.safetensors")
    rows = []
    for name, options in (("as is", []), ("+precision_policy=on", ["+precision_policy=on"]), MIXED):
        model, job = work / f"model-{len(rows)}", work / f"job-{len(rows)}"
        arguments = [f"checkpoint={checkpoint}", f"save_to={model}", f"steps={steps}", f"hydra.run.dir={job}"]
        log = run("train.py", *options, *arguments)
        rows.append(row(name, before, model, log))
    print(
        f"\n{'':<24} {'storage dtype':<14} {'compute dtype':<14} {'weights changed':>15} {'loss before':>12} {'loss after':>11}"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:] or ("100", "400")))
