"""The same decision, seen in every way in which Hydra runs a job."""

import inspect
import subprocess
import sys
from textwrap import dedent

import hydra
import pytest
import yaml
from conftest import ENVIRONMENT

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


def check_sweep(train, *overrides):
    """Sweep over the options and over the dtype, and look at each job's config and log."""
    train("--multirun", "+precision_policy=on,warn,off", "model.torch_dtype=auto,bfloat16", *overrides)
    logs = [(train.folder / f"sweep/{job}/app.log") for job in range(6)]
    jobs = [yaml.safe_load((train.folder / f"sweep/{job}/.hydra/config.yaml").read_text()) for job in range(6)]
    assert all(set(job) == {"model", "optimizer"} for job in jobs)
    assert [job["model"]["torch_dtype"] for job in jobs] == ["float32", "bfloat16", "auto", "bfloat16", "auto", "bfloat16"]
    saved = [yaml.safe_load((train.folder / f"sweep/{job}/.hydra/hydra.yaml").read_text()) for job in range(6)]
    records = [hydra["hydra"]["precision_policy"] for hydra in saved]
    rules = [(record["decision"] or {}).get("rule") for record in records]
    assert rules == ["set", "explicit_dtype", "warn_only", "explicit_dtype", None, None]
    texts = [log.read_text() if log.exists() else "" for log in logs]
    assert [text.count("[precision_policy][INFO]") for text in texts] == [2, 2, 2, 2, 0, 0]
    assert [text.count("[precision_policy][WARNING]") for text in texts] == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "launcher",
    [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]],
    ids=["basic", "joblib", "submitit"],
)
def test_sweep(application, launcher):
    """Every job of a sweep, in this process and in a launcher's worker; ``once`` is once per job."""
    check_sweep(application("bf16_weight"), *launcher)


def test_cfg_job(application):
    """``--cfg job`` shows what the job would get."""
    train = application("bf16_weight")
    assert yaml.safe_load(train("+precision_policy=on", "--cfg", "job").out) == train("+precision_policy=on").config


def test_compose_api(application):
    """``hydra.compose`` gives the same config."""
    train = application("idle")
    code = dedent("""
        import json
        from hydra import compose, initialize
        from omegaconf import OmegaConf
        with initialize(version_base='1.3', config_path='conf'):
            print('CONFIG ' + json.dumps(OmegaConf.to_container(compose('config', ['+precision_policy=on']))))
    """)
    expected = train("+precision_policy=on").config
    train.write("app.py", code)
    assert train().config == expected


def with_defaults(train, defaults):
    config = (train.folder / "conf/config.yaml").read_text()
    train.write("conf/config.yaml", f"defaults:\n{defaults}  - _self_\n{config}")
    return train


def test_defaults_list(application):
    """The option in the application's own defaults list, and the opt-outs."""
    train = with_defaults(application("bf16_weight"), '  - precision_policy: "on"\n')
    assert train().log == LINES
    assert train("precision_policy=off").log == ""
    assert train("~precision_policy").config["model"] == {"torch_dtype": "auto"}
    assert train("precision_policy.enabled=false").log == ""


def test_in_an_experiment_file(application):
    """The option selected by another config group's file."""
    train = with_defaults(application("bf16_weight"), "  - experiment: null\n")
    train.write("conf/experiment/full.yaml", '# @package _global_\ndefaults:\n  - /precision_policy: "on"\n')
    assert train("experiment=full").log == LINES


WITHOUT = """
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(('precision_policy', 'hydra_plugins.hydra_precision_policy')):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
warnings.simplefilter('ignore')
"""


def preceded(train, code):
    """The application, with code that runs before its own."""
    train.write("app.py", code + (train.folder / "app.py").read_text())
    return train


def test_off_is_byte_identical(application):
    """Without the option, config and log are those of an environment in which the package is not installed."""
    train = application("idle")
    runs, configs = [], []
    for _ in range(2):
        runs.append(train())
        configs.append((train.folder / "out/.hydra/config.yaml").read_bytes())
        preceded(train, WITHOUT)
    assert runs[0].out == runs[1].out
    assert configs[0] == configs[1]
    # The other side really runs without it: there the option is a key like any other.
    assert train("+precision_policy=on").config["precision_policy"] == "on"


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


def test_a_job_without_the_option_is_silent(application):
    assert application("idle")().log == ""


def test_pairs_are_said_one_by_one(application):
    """One log line each, and a warning whose fix names their keys."""
    train = application("bf16_weight")
    train.write(
        "conf/config.yaml",
        "a: {torch_dtype: bfloat16}\nb: {torch_dtype: auto}\noptimizer: {_target_: torch.optim.AdamW, _partial_: true}\n",
    )
    run = train("+precision_policy=on", "precision_policy.pairs={a:{model:a},b:{model:b}}")
    assert [line.split(": ")[1] for line in run.log.splitlines()[:2]] == ["nothing set (explicit_dtype)", "b.torch_dtype"]


def test_every_record_names_its_option(application):
    """Also where the format shows no logger's name."""
    run = application("bf16_weight")("+precision_policy=warn", "precision_policy.monitor.every=1")
    records = [line for line in run.out.splitlines() if "[precision_policy][" in line]
    assert len(records) == 4
    assert all("] - precision_policy=warn: " in line for line in records)


def test_python_m(application):
    """An application that is a module of a package."""
    train = application("bf16_weight")
    for name, text in (("__init__.py", ""), ("conf/__init__.py", "")):
        train.write(f"package/{name}", text)
    for name in ("app.py", "conf/config.yaml"):
        train.write(f"package/{name}", (train.folder / name).read_text())
    command = [sys.executable, "-m", "package.app", "+precision_policy=on", "hydra.run.dir=out"]
    finished = subprocess.run(command, cwd=train.folder, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert LINE[5:] in finished.stdout


@pytest.mark.skipif("execution_whitelist" not in inspect.signature(hydra.main).parameters, reason="of Hydra 1.4")
def test_execution_whitelist(application):
    """An application that has one needs no entry for the policy; one that has none is told nothing about it."""
    train = application("bf16_weight")
    assert "precision_policy" not in train("+precision_policy=on").err
    code = (train.folder / "app.py").read_text()
    train.write("app.py", code.replace('version_base="1.3"', 'execution_whitelist=["torch.*"]'))
    assert train("+precision_policy=on").log.startswith(LINE)
