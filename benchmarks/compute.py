"""What fp32 storage costs with bf16 compute and without, on an application that knows nothing of the policy.

``python compute.py --out DIRECTORY [--small] [--only WORD] [--skip-loss]``: each row is one job, run as its user would.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
BF16_OPTIMIZERS = {
    "optimi Kahan": ["optimizer._target_=optimi.AdamW", "~optimizer.fused"],
    "optimi Kahan, Triton": ["optimizer._target_=optimi.AdamW", "~optimizer.fused", "+optimizer.triton=true"],
    "torchao stochastic rounding": [
        "optimizer._target_=torchao.optim._AdamW",
        "~optimizer.fused",
        "+optimizer.bf16_stochastic_round=true",
    ],
}
POLICIES = {
    "off": ["+precision_policy=off"],
    "on": ["+precision_policy=on"],
    "on, own autocast": ["+precision_policy=on", "autocast=true"],
    # What mixed is to be compared with: it leaves autocast's cache of the weights off. The row before shows what the cache saves.
    "on, own autocast without its cache": ["+precision_policy=on", "autocast=true", "autocast_cache=false"],
    "mixed": ["+precision_policy=mixed"],
}
SHAPES = {
    "plain": [],
    "checkpointing": ["checkpointing=true"],
    "torch.compile(model)": ["compile=wrapper"],
    "model.compile()": ["compile=in_place"],
}
EXPECTED = {"off": "", "on": "", "on, own autocast": "bf16", "on, own autocast without its cache": "bf16", "mixed": "bf16"}


def run(checkpoint: Path, *arguments: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "llama_app.py"), f"model.pretrained_model_name_or_path={checkpoint}"]
        command += [*arguments, f"hydra.run.dir={folder}"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    output = finished.stdout + finished.stderr
    found = re.search(r"^RESULT (.*)$", output, re.MULTILINE)
    if found is None:
        print(output[-2000:], flush=True)
        return {"failed": output.strip().splitlines()[-1] if output.strip() else "no output"}
    told = re.search(r"stored in (\w+)(?:, computed in (\w+)(?: by ([\w' ]+))?)?", output)
    warned = "slower than in bf16" in output
    return {**json.loads(found[1]), "told": told[0] if told else "", "warned": warned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="made where it is not there")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name has this word")
    parser.add_argument("--skip-loss", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint = given.checkpoint or given.out / "checkpoint"
    if not (checkpoint / "config.json").exists():
        extra = ["--small", "--steps", "20"] if given.small else []
        subprocess.run([sys.executable, str(HERE / "llama_checkpoint.py"), str(checkpoint), *extra], check=True)
    size = ["batch=4", "length=64", "steps=6", "optimizer.fused=null"] if given.small else []
    rows = []

    def row(experiment: str, shape: str, way: str, *arguments: str) -> None:
        if given.only not in f"{experiment} {shape} {way}":
            return
        result = run(checkpoint, *size, *arguments)
        rows.append({"experiment": experiment, "shape": shape, "way": way, **result})
        print(json.dumps(rows[-1]), flush=True)

    measure(row, given.small, given.skip_loss)
    name = "compute-small.csv" if given.small else "compute.csv"
    columns = list(dict.fromkeys(key for one in rows for key in one))
    with (given.out / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    if given.small:
        check(rows)


def measure(row: Callable[..., None], small: bool, skip_loss: bool) -> None:
    """All rows, one job each."""
    for shape, flags in SHAPES.items():
        if small and "compile" in shape:
            continue
        for way, options in POLICIES.items():
            steps = [] if small else ["steps=6"] if way == "on" else ["steps=20"]
            row("cost", shape, way, *flags, *options, *steps)
    if not small:
        for way, options in BF16_OPTIMIZERS.items():
            row("cost", "checkpointing", f"bf16, {way}", "checkpointing=true", "+precision_policy=off", *options)
    if not skip_loss and not small:
        for seed in (0, 1):  # their spread is what a difference is judged by
            for way in ("on, own autocast", "on, own autocast without its cache", "mixed"):
                row("loss after 50 steps", "plain", way, *POLICIES[way], f"seed={seed}", "steps=50")
        kahan = BF16_OPTIMIZERS["optimi Kahan, Triton"]
        for way, options in {"off": POLICIES["off"], "mixed": POLICIES["mixed"], "optimi Kahan, Triton": kahan}.items():
            row("loss after 300 steps", "plain", way, *options, "steps=300")


def check(rows: list[dict]) -> None:
    """On a CPU: what was told of the compute dtypes is what each row asked for."""
    for one in rows:
        computed = re.search(r"computed in (\w+)", one["told"])
        assert (computed[1] if computed else "") == EXPECTED[one["way"]], one
    print("compute dtypes as expected")


if __name__ == "__main__":
    main()
