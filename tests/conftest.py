"""Real Hydra applications, each in a folder of its own and run as processes of their own."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, settings
from job_starter import JobStarter

ROOT = Path(__file__).parent.parent
APPS = ROOT / "tests/apps"

# A machine that is busy with something else is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

OPTIONS = ("on", "mixed", "master_weights", "warn", "strict", "off")
WRITING = ("on", "mixed", "strict")  # those of them that set fp32 storage

# The lines that most composed configs have.
AUTO = "model: {torch_dtype: auto}\n"
ADAMW = "optimizer: {_target_: torch.optim.AdamW}\n"

# Making the first optimizer imports torch._dynamo, which takes as long as torch does.
IMPORTS = ["torch", "torch._dynamo", "hydra"]
HEAVY_IMPORTS = [
    *IMPORTS,
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "accelerate",
    "peft",
    "lightning",
    "hydra_zen",
]

# What a launcher of the machine that runs the tests may have set.
_RANKS = re.compile(r"^(RANK|LOCAL_RANK|WORLD_SIZE|SLURM_|OMPI_|PMI_|PMIX_|HYDRA_)")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not _RANKS.match(key)} | {"OMP_NUM_THREADS": "1"}


def pytest_collection_modifyitems(items):
    """Mark the tests that start an application: mutation testing does without them."""
    for item in items:
        if "application" in getattr(item, "fixturenames", ()):
            item.add_marker("process")


@dataclass
class Run:
    """What finished processes said.

    Attributes:
        statuses: what each of them exited with; those of ``torchrun`` and of other launchers are not known.
        out: their standard output, one after the other.
        err: their standard error, likewise.
    """

    statuses: list[int]
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

    @property
    def levels(self) -> list[str]:
        """The level of each of the policy's log lines."""
        return [line.split()[0] for line in self.log.splitlines()]


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

    def __call__(
        self, *arguments: str, status: int | None = 0, python=None, ranks=None, env=None, outputs=True, timeout=300
    ) -> Run:
        """Run it as a process of its own and expect an exit status of each; None takes any.

        Args:
            arguments: its command line.
            status: what it exits with.
            python: the words that start an interpreter, where it must be a fresh one; otherwise the process is a fork of one that
                has imported torch and Hydra.
            ranks: run it as so many forks at once, with the environment that ``torchrun`` gives to its ranks. None of them is
                stopped because another one failed.
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
            environments = environments_of_ranks(environment, ranks) if ranks else [environment]
            statuses = self._starter.run(self.program, words, self.folder, environments, timeout)
            out, err = (self._read(name, len(statuses)) for name in (".stdout", ".stderr"))
        else:
            command = [*(python if isinstance(python, list) else [python]), self.program, *words]
            finished = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
            statuses, out, err = [finished.returncode], finished.stdout, finished.stderr
        if status is not None and set(statuses) != {status}:
            raise AssertionError(f"{self.program} {' '.join(words)} exited {statuses}\n{out}\n{err}")
        return Run(statuses, out, err)

    def refuses(self, *arguments: str) -> str:
        """What it says of a command line for which no job starts: exit status 1, and no traceback."""
        run = self(*arguments, status=1)
        assert "Traceback" not in run.err
        assert "CONFIG" not in run.out
        return run.err

    def record(self, output: str = "out") -> dict:
        """What the policy has recorded about a finished job, by the folder of its output."""
        return yaml.safe_load((self.folder / output / ".hydra/hydra.yaml").read_text())["hydra"]["precision_policy"]

    def _read(self, name: str, processes: int) -> str:
        """What all processes of the last run wrote, one after the other."""
        return "".join((self.folder / f"{name}.{number}").read_text() for number in range(processes))


def environments_of_ranks(environment: dict, count: int) -> list[dict]:
    """What ``torchrun`` adds to the environment of each of its ranks on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"} for rank in range(count)]
    return [environment | world | rank for rank in ranks]


def torchrun(processes: int) -> list[str]:
    """The words that start so many ranks by ``torchrun`` itself, each in a fresh interpreter."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


# What `bf16_weight` gets in a sweep, by option and by the dtype asked for: its dtype, the rule, the policy's INFO and WARNING lines.
SWEPT = {
    ("on", "auto"): ("float32", "set", 2, 0),
    ("on", "bfloat16"): ("bfloat16", "explicit_dtype", 2, 1),
    ("warn", "auto"): ("auto", "warn_only", 2, 1),
    ("warn", "bfloat16"): ("bfloat16", "explicit_dtype", 2, 1),
    ("off", "auto"): ("auto", None, 0, 0),
    ("off", "bfloat16"): ("bfloat16", None, 0, 0),
}


def check_sweep(train: App, *overrides: str, options=("on", "warn", "off")) -> None:
    """Sweep over options and over the dtype, and look at each job's config and log."""
    train("--multirun", f"+precision_policy={','.join(options)}", "model.torch_dtype=auto,bfloat16", *overrides)
    jobs = [(option, dtype) for option in options for dtype in ("auto", "bfloat16")]
    for number, job in enumerate(jobs):
        output = train.folder / f"sweep/{number}"
        config = yaml.safe_load((output / ".hydra/config.yaml").read_text())
        assert set(config) == {"model", "optimizer"}
        decision = train.record(f"sweep/{number}")["decision"] or {}
        log = (output / "app.log").read_text() if (output / "app.log").exists() else ""
        levels = log.count("[precision_policy][INFO]"), log.count("[precision_policy][WARNING]")
        assert (config["model"]["torch_dtype"], decision.get("rule"), *levels) == SWEPT[job]


@pytest.fixture(scope="session")
def job_starter():
    """Starts applications, each as a process of its own."""
    starter = JobStarter(IMPORTS, ENVIRONMENT)
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def heavy_starter():
    """Starts applications of transformers, peft, accelerate and Lightning, each as a process of its own."""
    starter = JobStarter(HEAVY_IMPORTS, ENVIRONMENT)
    yield starter
    starter.close()


@pytest.fixture
def application(tmp_path, job_starter, heavy_starter):
    """Make a copy of an application of ``tests/apps``, by the name of its folder there.

    It is started from a process that has imported torch and Hydra, ``heavy`` from one that has imported transformers, peft,
    accelerate, Lightning and FSDP as well. ``folder`` names the copy where a test makes several.
    """

    def make(name: str, program: str = "app.py", *, heavy: bool = False, folder: str | None = None) -> App:
        copy = tmp_path / (folder or name)
        shutil.copytree(APPS / name, copy)
        return App(copy, heavy_starter if heavy else job_starter, program)

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
def checkpoint():
    """The demo's checkpoint: 492,160 parameters in bf16."""
    return ROOT / "examples/finetune/checkpoint"
