"""Real Hydra applications, written into a folder and run as subprocesses."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

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
        if {"app", "checkpoint"} & set(getattr(item, "fixturenames", ())):
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


class App:
    """An application in a folder of its own."""

    def __init__(self, folder: Path, config: str, code: str) -> None:
        self.folder = folder
        (folder / "conf").mkdir()
        self.write("conf/config.yaml", config)
        self.write("app.py", code)

    def write(self, name: str, text: str) -> None:
        """Add a file."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def __call__(self, *arguments: str, status: int | None = 0, python=sys.executable, env=None, **options) -> Run:
        """Run it and expect an exit status; None takes any."""
        command = [*(python if isinstance(python, list) else [python]), "app.py", *arguments]
        if not {"--cfg", "--multirun", "-m"} & set(arguments):
            command.append("hydra.run.dir=out")
        if {"--multirun", "-m"} & set(arguments):
            command.append("hydra.sweep.dir=sweep")
        finished = subprocess.run(
            command,
            cwd=self.folder,
            env=ENVIRONMENT | (env or {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )
        if status is not None and finished.returncode != status:
            raise AssertionError(f"{command} exited {finished.returncode}\n{finished.stdout}\n{finished.stderr}")
        return Run(finished.returncode, finished.stdout, finished.stderr)


@pytest.fixture
def app(tmp_path):
    """Make an application: by default one that trains a bf16 weight unless its config says float32."""

    def make(config: str = CONFIG, code: str = TRAIN, folder: str = "app") -> App:
        (tmp_path / folder).mkdir()
        return App(tmp_path / folder, config, code)

    return make


@pytest.fixture
def compose(tmp_path):
    """Compose a config through the Compose API, in this process."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    def run(config: str, *overrides: str):
        (tmp_path / "config.yaml").write_text(config)
        with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
            return hydra_compose("config", overrides=list(overrides))

    return run


@pytest.fixture
def decide(compose):
    """The decision that the Compose API records for a config with the policy on."""
    return lambda config, *overrides: compose(config, "+precision_policy=on", *overrides).precision_policy.decision


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The demo's checkpoint, pretrained for a few steps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    script = Path(__file__).parent.parent / "examples/finetune/make_checkpoint.py"
    subprocess.run([sys.executable, str(script), str(folder), "20"], check=True, env=ENVIRONMENT, capture_output=True)
    return folder
