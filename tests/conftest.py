"""Real Hydra applications, written into a folder and run as subprocesses."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from job_starter import JobStarter

APPS = Path(__file__).parent / "apps"

# A machine that is busy with something else is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TRAIN = """
import json
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import torch
    dtype = cfg.get("model") and cfg.model.get("torch_dtype")
    dtype = torch.float32 if dtype in ("float32", "fp32") else torch.bfloat16
    weights = torch.nn.Parameter(torch.ones(8, 8, dtype=dtype))
    make = hydra.utils.instantiate(cfg.optimizer) if cfg.get("optimizer") else torch.optim.AdamW
    optimizer = make([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))

if __name__ == "__main__":
    main()
"""

CONFIG = """
model:
  torch_dtype: auto
optimizer:
  _target_: torch.optim.AdamW
  _partial_: true
  lr: 1.0e-5
"""

# What a launcher of the machine that runs the tests may have set.
_RANKS = re.compile(r"^(RANK|LOCAL_RANK|WORLD_SIZE|SLURM_|OMPI_|PMI_|PMIX_|HYDRA_)")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not _RANKS.match(key)} | {"OMP_NUM_THREADS": "1"}


def pytest_collection_modifyitems(items):
    """Mark the tests that start an application, or make a checkpoint by one: mutation testing does without them."""
    for item in items:
        if {"app", "application", "checkpoint"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")


@dataclass
class Run:
    """What a finished process said."""

    status: int
    out: str
    err: str

    @property
    def log(self) -> str:
        """The policy's log lines, without the time."""
        lines = re.findall(r"\[precision_policy\]\[(\w+)\] - (.*)", self.out)
        return "\n".join(f"{level} {text}" for level, text in lines)

    @property
    def configs(self) -> list[dict]:
        """The config of each job, as the job saw it."""
        return [json.loads(text) for text in re.findall(r"^CONFIG (.*)$", self.out, re.MULTILINE)]

    @property
    def config(self) -> dict:
        """The config of the one job."""
        (config,) = self.configs
        return config

    @property
    def record(self) -> dict:
        """What the policy recorded for the one job, as the job saw it."""
        (record,) = (json.loads(text) for text in re.findall(r"^RECORD (.*)$", self.out, re.MULTILINE))
        return record


class App:
    """An application in a folder of its own.

    Args:
        folder: the folder.
        starter: starts its jobs.
        program: the file that is run.
    """

    def __init__(self, folder: Path, starter: JobStarter, program: str = "app.py") -> None:
        self.folder = folder
        self.program = program
        self._starter = starter

    def write(self, name: str, text: str) -> None:
        """Add a file."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def __call__(self, *arguments: str, status: int | None = 0, python=None, env=None, outputs=True, timeout=120) -> Run:
        """Run it as a process of its own and expect an exit status; None takes any.

        Args:
            arguments: its command line.
            status: what it exits with.
            python: the words that start an interpreter, where it must be a fresh one; otherwise the process is a fork of one that
                has imported torch and Hydra.
            env: environment variables beside those of the tests.
            outputs: whether Hydra's output goes to ``out`` or ``sweep`` in the folder.
            timeout: in seconds.
        """
        sweeps = {"--multirun", "-m"} & set(arguments)
        words = list(arguments)
        if outputs and sweeps:
            words.append("hydra.sweep.dir=sweep")
        elif outputs and not {"--cfg", "--help", "--info", "--experimental-rerun"} & set(arguments):
            words.append("hydra.run.dir=out")
        environment = ENVIRONMENT | (env or {})
        if python is None:
            returned = self._starter.run(self.program, words, self.folder, environment, timeout)
            out, err = ((self.folder / name).read_text() for name in (".stdout", ".stderr"))
        else:
            command = [*(python if isinstance(python, list) else [python]), self.program, *words]
            finished = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
            returned, out, err = finished.returncode, finished.stdout, finished.stderr
        if status is not None and returned != status:
            raise AssertionError(f"{self.program} {' '.join(words)} exited {returned}\n{out}\n{err}")
        return Run(returned, out, err)


@pytest.fixture(scope="session")
def job_starter():
    """Starts applications, each as a process of its own."""
    starter = JobStarter(ENVIRONMENT)
    yield starter
    starter.close()


@pytest.fixture
def application(tmp_path, job_starter):
    """Make a copy of an application of ``tests/apps``, by the name of its folder there."""

    def make(name: str, program: str = "app.py") -> App:
        shutil.copytree(APPS / name, tmp_path / name)
        return App(tmp_path / name, job_starter, program)

    return make


@pytest.fixture
def app(tmp_path, job_starter):
    """Make an application: by default one that trains a bf16 weight unless its config says float32."""

    def make(config: str = CONFIG, code: str = TRAIN, folder: str = "app") -> App:
        made = App(tmp_path / folder, job_starter)
        made.write("conf/config.yaml", config)
        made.write("app.py", code)
        return made

    return make


@pytest.fixture
def compose(tmp_path):
    """Compose a config through the Compose API, in this process."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    def run(config: str, *overrides: str, with_hydra: bool = False):
        (tmp_path / "config.yaml").write_text(config)
        with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
            return hydra_compose("config", overrides=list(overrides), return_hydra_config=with_hydra)

    return run


@pytest.fixture
def record(compose):
    """What the policy records for a config under the Compose API."""
    return lambda config, *overrides: compose(config, *overrides, with_hydra=True).hydra.precision_policy


@pytest.fixture
def decide(record):
    """The decision that the Compose API records for a config with the policy on."""
    return lambda config, *overrides: record(config, "+precision_policy=on", *overrides).decision


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The demo's checkpoint, pretrained for a few steps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    script = Path(__file__).parent.parent / "examples/finetune/make_checkpoint.py"
    subprocess.run([sys.executable, str(script), str(folder), "20"], check=True, env=ENVIRONMENT, capture_output=True)
    return folder
