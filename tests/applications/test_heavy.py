"""What takes a heavy install, so `make test-all` alone runs it: the Ray launcher, the Optuna sweeper, DeepSpeed's engine."""

import sys

import pytest
import yaml
from conftest import CONFIG
from test_runs import check_sweep

pytestmark = pytest.mark.heavy


def test_ray(app):
    """A sweep on a local Ray cluster: the job of each worker is decided, logged and watched like one of the basic launcher."""
    check_sweep(app(), "hydra/launcher=ray")


OPTUNA = """
import hydra, torch

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    dtype = torch.float32 if cfg.model.torch_dtype == "float32" else torch.bfloat16
    hydra.utils.instantiate(cfg.optimizer)([torch.nn.Parameter(torch.ones(8, 8, dtype=dtype))])
    return cfg.optimizer.lr

main()
"""


def test_optuna(app):
    """Every trial of an Optuna sweep, over a learning rate and over the dtype."""
    train = app(CONFIG, OPTUNA)
    spaces = ["optimizer.lr=interval(0.00001,0.001)", "model.torch_dtype=choice(auto,bfloat16)"]
    train("--multirun", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "+precision_policy=on", *spaces)
    for job in range(6):
        folder = train.folder / f"sweep/{job}"
        config = yaml.safe_load((folder / ".hydra/config.yaml").read_text())
        log = (folder / "app.log").read_text()
        chosen = config["precision_policy"]["decision"]["rule"] == "explicit_dtype"
        assert config["model"]["torch_dtype"] == ("bfloat16" if chosen else "float32")
        assert log.count("[precision_policy][INFO]") == 1
        assert log.count("[precision_policy][WARNING]") == chosen


DEEPSPEED = """
import hydra, torch

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import deepspeed
    model = torch.nn.Linear(16, 16).to(torch.bfloat16)
    config = {"train_batch_size": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": cfg.stage},
              "zero_allow_untested_optimizer": True}
    if cfg.builds_its_own:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}
    optimizer = None if cfg.builds_its_own else hydra.utils.instantiate(cfg.optimizer)(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, model_parameters=model.parameters())
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 16, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    torch.distributed.destroy_process_group()

main()
"""


@pytest.mark.parametrize(("stage", "builds_its_own"), [(0, False), (1, False), (1, True), (3, False)])
def test_deepspeed(app, stage, builds_its_own):
    """The engine builds or gets a torch AdamW over bf16 and then swaps its own fp32 copies in: the warning is taken back."""
    config = f"stage: {stage}\nbuilds_its_own: {builds_its_own}\n{CONFIG}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    train = app(config, DEEPSPEED)
    run = train("+precision_policy=on", "model.torch_dtype=bfloat16", python=torchrun)
    assert [line.split()[0] for line in run.log.splitlines()] == ["INFO", "WARNING", "INFO"]
    assert "INFO precision_policy=on: warning taken back" in run.log
    strict = train("+precision_policy=strict", "model.torch_dtype=bfloat16", python=torchrun)
    assert [line.split()[0] for line in strict.log.splitlines()] == ["INFO"]
