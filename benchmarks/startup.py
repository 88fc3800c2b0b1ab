"""What discovery costs every Hydra application: import time as Hydra reports it, and start-up with and without the plugin.

    python benchmarks/startup.py

Makes two environments, with the wheel and without it, alike otherwise. All of one run; ratios are what counts.
"""

import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTS = """
import json, hydra
from hydra.core.plugins import Plugins
print(json.dumps(Plugins.instance().get_stats().modules_import_time))
"""
APP = """
import hydra
@hydra.main(version_base="1.3", config_path=None)
def main(cfg): ...
main()
"""
PLUGINS = {
    "this plugin": "hydra_plugins.hydra_precision_policy",
    "colorlog": "hydra_plugins.hydra_colorlog",
    "joblib launcher": "hydra_plugins.hydra_joblib_launcher",
    "submitit launcher": "hydra_plugins.hydra_submitit_launcher",
}


def environment(folder: Path, *packages: str) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    plugins = ["hydra-colorlog", "hydra-joblib-launcher", "hydra-submitit-launcher"]
    subprocess.run([*pip, "hydra-core==1.3.8", *plugins], check=True)
    for package in packages:  # without torch: discovery and an application without the policy need none
        subprocess.run([*pip, "--no-deps", package], check=True)
    return python


def wheel(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    return str(next(folder.glob("hydra_precision_policy-*.whl")))


def start(python: Path, script: Path) -> float:
    """The processor time of one start, which the machine's other work disturbs less than the time on the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(python), str(script), "hydra.run.dir=out"], check=True, cwd=script.parent, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def instructions(python: Path, script: Path) -> int:
    """One start, counted: the timings' noise is as large as what they are to show."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(python), str(script), "hydra.run.dir=out"]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    run = subprocess.run(command, check=True, cwd=script.parent, env=environment, capture_output=True, text=True)
    return int(re.search(r"Collected : (\d+)", run.stderr)[1])


def spread(values: list[float]) -> str:
    quarters = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.4g} (quartiles {quarters[0]:.4g} to {quarters[2]:.4g})"


def main() -> None:
    repeats = int(os.environ.get("REPEATS", "300"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with_it = environment(folder / "with", wheel(folder))
        without = environment(folder / "without")
        times: dict[str, list[float]] = {plugin: [] for plugin in PLUGINS}
        for _ in range(repeats // 6):
            # Not from the checkout: its own hydra_plugins would be discovered too.
            command = [str(with_it), "-c", IMPORTS]
            out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
            stats = json.loads(out)
            for plugin, prefix in PLUGINS.items():
                times[plugin].append(1e3 * sum(t for module, t in stats.items() if module.startswith(prefix)))
        print("import time as Hydra reports it, ms")
        joblib = statistics.median(times["joblib launcher"])
        for plugin, values in times.items():
            print(f"  {plugin:<20}{spread(values):<44} {statistics.median(values) / joblib:.2f} x the joblib launcher's")
        script = folder / "app.py"
        script.write_text(APP)
        for python in (with_it, without):
            start(python, script)
        # Alternating, and the order swapped each time: the machine's own drift falls on both alike.
        seconds: dict[Path, list[float]] = {with_it: [], without: []}
        for number in range(repeats):
            for python in (with_it, without) if number % 2 else (without, with_it):
                seconds[python].append(start(python, script))
        ratio = statistics.median(seconds[with_it]) / statistics.median(seconds[without])
        print(
            f"start-up of an application, processor time, ms\n  with the plugin     {spread([1e3 * s for s in seconds[with_it]])}"
        )
        print(f"  without             {spread([1e3 * s for s in seconds[without]])}\n  ratio               {ratio:.4f}")

        if shutil.which("valgrind"):
            counted = [instructions(python, script) for python in (with_it, without)]
            print(f"  in instructions     {counted[0]:,} / {counted[1]:,} = {counted[0] / counted[1]:.4f}")


if __name__ == "__main__":
    main()
