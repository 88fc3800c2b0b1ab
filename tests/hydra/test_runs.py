"""The same decision, seen in every way in which Hydra runs a job."""

import inspect
import subprocess
import sys

import hydra
import pytest
import yaml
from conftest import ENVIRONMENT, check_sweep

LINE = (
    "INFO precision_policy=on: model.torch_dtype: auto -> float32: "
    "torch.optim.AdamW keeps no fp32 master copy (keep bf16: model.torch_dtype=bfloat16)"
)
CONFIRMED = "INFO precision_policy=on: 1 trainable tensor, 64 elements: stored in fp32, updated in fp32"
LINES = f"{LINE}\n{CONFIRMED}"


def test_run(application):
    """A plain run: the job's config, the saved config and one log line."""
    train = application("bf16_weight")
    run = train("+precision_policy=on")
    assert run.config["model"] == {"torch_dtype": "float32"}
    assert yaml.safe_load((train.folder / "out/.hydra/config.yaml").read_text()) == run.config
    assert run.log == LINES
    assert LINE[5:] in (train.folder / "out/app.log").read_text()


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ([], ["on", "warn", "off"]),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["on"]),
        (["hydra/launcher=submitit_local"], ["on"]),
    ],
    ids=["basic", "joblib", "submitit"],
)
def test_sweep(application, launcher, options):
    """Every job of a sweep, in this process and in a launcher's worker; ``once`` is once per job."""
    check_sweep(application("bf16_weight"), *launcher, options=options)


def test_cfg_job(application):
    """``--cfg job`` shows what the job would get."""
    train = application("bf16_weight")
    assert yaml.safe_load(train("+precision_policy=on", "--cfg", "job").out) == train("+precision_policy=on").config


def test_defaults_list(application):
    """The option in the application's own defaults list, and the opt-outs."""
    train, switched_on = application("bf16_weight"), ["--config-name", "switched_on"]
    assert train(*switched_on).log == LINES
    assert train(*switched_on, "precision_policy=off").log == ""
    assert train(*switched_on, "~precision_policy").config["model"] == {"torch_dtype": "auto"}
    assert train(*switched_on, "precision_policy.enabled=false").log == ""


def test_in_an_experiment_file(application):
    """The option selected by another config group's file."""
    assert application("bf16_weight")("--config-name", "experiments", "experiment=full").log == LINES


def test_off_is_byte_identical(application):
    """Without the option, config and log are those of an environment in which the package is not installed."""
    installed = application("idle", folder="installed")
    without = application("idle", "without_the_package.py", folder="without")
    assert installed().out == without().out
    configs = [(train.folder / "out/.hydra/config.yaml").read_bytes() for train in (installed, without)]
    assert configs[0] == configs[1]
    # The other side really runs without it: there the option is a key like any other.
    assert without("+precision_policy=on").config["precision_policy"] == "on"


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        ("peft", ["+peft=true"]),
        ("no_model", ["~model"]),
        ("no_optimizer", ["~optimizer"]),
        ("not_torch_optim", ["optimizer._target_=optimi.AdamW"]),
        ("explicit_dtype", ["model.torch_dtype=float32"]),
        ("no_dtype_key", ["~model.torch_dtype"]),
        ("warn_only", ["precision_policy.write=false"]),
    ],
)
def test_every_rule_logs_a_line(application, rule, arguments):
    """Not only ``set`` is said; each as an INFO, since nothing was seen to be wrong."""
    run = application("idle")("+precision_policy=on", *arguments)
    (line,) = run.log.splitlines()
    assert line.startswith(f"INFO precision_policy=on: nothing set ({rule}): ")


def test_pairs_are_said_one_by_one(application):
    """One log line each, and a warning whose fix names their keys."""
    pairs = "precision_policy.pairs={a:{model:a},b:{model:b}}"
    run = application("bf16_weight")("--config-name", "pairs", "+precision_policy=on", pairs)
    assert [line.split(": ")[1] for line in run.log.splitlines()[:2]] == ["nothing set (explicit_dtype)", "b.torch_dtype"]


def test_every_record_names_its_option(application):
    """Also where the format shows no logger's name."""
    run = application("bf16_weight")("+precision_policy=warn", "precision_policy.monitor.every=1")
    records = [line for line in run.out.splitlines() if "[precision_policy][" in line]
    assert len(records) == 4
    assert all("] - precision_policy=warn: " in line for line in records)


def test_python_m(application):
    """An application that is a module of a package."""
    package = application("bf16_weight", folder="package").folder
    for folder in (package, package / "conf"):
        (folder / "__init__.py").touch()
    command = [sys.executable, "-m", "package.app", "+precision_policy=on", "hydra.run.dir=out"]
    finished = subprocess.run(command, cwd=package.parent, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert LINE[5:] in finished.stdout


@pytest.mark.skipif("execution_whitelist" not in inspect.signature(hydra.main).parameters, reason="of Hydra 1.4")
def test_execution_whitelist(application):
    """An application that has one needs no entry for the policy; one that has none is told nothing about it."""
    assert "precision_policy" not in application("bf16_weight", folder="none")("+precision_policy=on").err
    assert application("bf16_weight", "whitelist.py")("+precision_policy=on").log.startswith(LINE)
