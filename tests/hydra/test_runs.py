"""The same decision, seen in every way in which Hydra runs a job."""

import inspect
import subprocess
import sys
from textwrap import dedent

import hydra
import pytest
import yaml
from conftest import CONFIG, ENVIRONMENT

LINE = (
    "INFO precision_policy=on: model.torch_dtype: auto -> float32: "
    "torch.optim.AdamW keeps no fp32 master copy (keep bf16: model.torch_dtype=bfloat16)"
)
CONFIRMED = "INFO precision_policy=on: 1 trainable tensor, 64 elements: stored in fp32"
LINES = f"{LINE}\n{CONFIRMED}"


def test_run(app):
    """A plain run: the job's config, the saved config and one log line."""
    train = app()
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
    assert [job["model"]["torch_dtype"] for job in jobs] == ["float32", "bfloat16", "auto", "bfloat16", "auto", "bfloat16"]
    rules = [(job["precision_policy"]["decision"] or {}).get("rule") for job in jobs]
    assert rules == ["set", "explicit_dtype", "warn_only", "explicit_dtype", None, None]
    texts = [log.read_text() if log.exists() else "" for log in logs]
    assert [text.count("[precision_policy][INFO]") for text in texts] == [2, 1, 1, 1, 0, 0]
    assert [text.count("[precision_policy][WARNING]") for text in texts] == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "launcher",
    [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]],
    ids=["basic", "joblib", "submitit"],
)
def test_sweep(app, launcher):
    """Every job of a sweep, in this process and in a launcher's worker; ``once`` is once per job."""
    check_sweep(app(), *launcher)


def test_a_saved_config_runs_again(app):
    """What a job saved, policy and decision included, is a config like any other."""
    train = app()
    first = train("+precision_policy=on").config
    again = train("--config-path", str(train.folder / "out/.hydra"), "--config-name", "config")
    assert again.config == first
    assert again.log == LINES.replace("precision_policy=on: ", "precision_policy: ")  # it names no option
    other = train("--config-path", str(train.folder / "out/.hydra"), "--config-name", "config", "model.torch_dtype=bfloat16")
    assert other.config["precision_policy"]["decision"]["rule"] == "explicit_dtype"


def test_cfg_job(app):
    """``--cfg job`` shows what the job would get, and its package reads well as it stands."""
    train = app()
    shown = yaml.safe_load(train("+precision_policy=on", "--cfg", "job").out)
    assert shown == train("+precision_policy=on").config
    text = train("+precision_policy=on", "--cfg", "job", "--package", "precision_policy").out
    assert "rule: set" in text
    assert "keep bf16: model.torch_dtype=bfloat16" in text


def test_compose_api(app):
    """``hydra.compose`` gives the same config."""
    code = dedent("""
        import json
        from hydra import compose, initialize
        from omegaconf import OmegaConf
        with initialize(version_base='1.3', config_path='conf'):
            print('CONFIG ' + json.dumps(OmegaConf.to_container(compose('config', ['+precision_policy=on']))))
    """)
    assert app(code=code)().config == app(folder="run")("+precision_policy=on").config


def test_defaults_list(app):
    """The option in the application's own defaults list, and the opt-outs."""
    train = app('defaults:\n  - precision_policy: "on"\n  - _self_\n' + CONFIG)
    assert train().log == LINES
    assert train("precision_policy=off").log == ""
    assert train("~precision_policy").config["model"] == {"torch_dtype": "auto"}
    assert train("precision_policy.enabled=false").log == ""


def test_in_an_experiment_file(app):
    """The option selected by another config group's file."""
    train = app("defaults:\n  - experiment: null\n  - _self_\n" + CONFIG)
    train.write("conf/experiment/full.yaml", '# @package _global_\ndefaults:\n  - /precision_policy: "on"\n')
    assert train("experiment=full").log == LINES


def test_applications_own_option(app):
    """An application may ship options of its own; they extend ours."""
    train = app("defaults:\n  - _self_\n" + CONFIG)
    option = '# @package _global_\ndefaults:\n  - "on"\nprecision_policy:\n  bf16_adam: ignore\n'
    train.write("conf/precision_policy/ours.yaml", option)
    run = train("+precision_policy=ours", "model.torch_dtype=bfloat16")
    assert run.config["precision_policy"]["bf16_adam"] == "ignore"
    assert "WARNING" not in run.log


def test_off_is_byte_identical(app, tmp_path):
    """Without the option, config and log are those of an environment in which the package is not installed."""
    without = dedent("""
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.startswith(('precision_policy', 'hydra_plugins.hydra_precision_policy')):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Block())
        import warnings; warnings.simplefilter('ignore')
    """)
    from conftest import TRAIN

    with_it, without_it = app(folder="with"), app(code=without + TRAIN, folder="without")
    runs = [one() for one in (with_it, without_it)]
    assert runs[0].out == runs[1].out
    configs = [(one.folder / "out/.hydra/config.yaml").read_bytes() for one in (with_it, without_it)]
    assert configs[0] == configs[1]
    # The other side really runs without it: there the option is a key like any other.
    assert without_it("+precision_policy=on").config["precision_policy"] == "on"


def test_hydra_that_this_version_does_not_know(app):
    """If composition is not where it was, the job stops with an error that says so."""
    from conftest import TRAIN

    break_it = dedent("""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl as C
        import precision_policy.composition.hydra_hook as hook
        hook.install = lambda: None
    """)
    run = app(code=break_it + TRAIN)("+precision_policy=on", status=1)
    assert "does not know this version of Hydra" in run.err
    assert "CONFIG" not in run.out


@pytest.mark.parametrize("rule", ["no_model", "no_optimizer", "peft", "not_torch_optim", "explicit_dtype"])
def test_every_rule_logs_a_line(app, rule):
    """Not only ``set`` is said."""
    arguments = {
        "no_model": ["~model"],
        "no_optimizer": ["~optimizer"],
        "peft": ["+peft=true"],
        "not_torch_optim": ["optimizer._target_=optimi.AdamW"],
        "explicit_dtype": ["model.torch_dtype=float32"],
    }[rule]
    code = dedent("""
        import hydra
        @hydra.main(version_base='1.3', config_path='conf', config_name='config')
        def main(cfg): ...
        main()
    """)
    level = "WARNING" if rule in ("no_model", "no_optimizer") else "INFO"
    assert f"{level} precision_policy=on: nothing set ({rule}): " in app(code=code)("+precision_policy=on", *arguments).log


def test_python_m(app):
    """An application that is a module of a package."""
    from conftest import TRAIN

    train = app()
    train.write("package/__init__.py", "")
    train.write("package/train.py", TRAIN)
    train.write("package/conf/__init__.py", "")
    train.write("package/conf/config.yaml", CONFIG)
    command = [sys.executable, "-m", "package.train", "+precision_policy=on", "hydra.run.dir=out"]
    finished = subprocess.run(command, cwd=train.folder, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert LINE[5:] in finished.stdout


@pytest.mark.skipif("execution_whitelist" not in inspect.signature(hydra.main).parameters, reason="of Hydra 1.4")
def test_execution_whitelist(app):
    """An application that has one needs no entry for the policy; one that has none is told nothing about it."""
    from conftest import TRAIN

    code = TRAIN.replace('version_base="1.3"', 'execution_whitelist=["torch.*"]')
    assert app(code=code)("+precision_policy=on").log.startswith(LINE)
    assert "precision_policy" not in app(folder="without")("+precision_policy=on").err
