"""What takes a heavy install, so `make test-all` alone runs it: the Ray launcher, the Optuna sweeper, DeepSpeed's engine."""

import pytest
import yaml
from conftest import check_sweep, torchrun

pytestmark = pytest.mark.heavy


def test_ray(application):
    """A sweep on a local Ray cluster: the job of each worker is decided, logged and watched like one of the basic launcher."""
    check_sweep(application("train"), "hydra/launcher=ray")


def test_optuna(application):
    """Every trial of an Optuna sweep, over a learning rate and over the dtype."""
    train = application("optuna")
    spaces = ["optimizer.lr=interval(0.00001,0.001)", "model.torch_dtype=choice(auto,bfloat16)"]
    train("--multirun", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "+precision_policy=on", *spaces)
    for job in range(6):
        folder = train.folder / f"sweep/{job}"
        config = yaml.safe_load((folder / ".hydra/config.yaml").read_text())
        log = (folder / "app.log").read_text()
        chosen = train.record(f"sweep/{job}")["decision"]["rule"] == "explicit_dtype"
        assert config["model"]["torch_dtype"] == ("bfloat16" if chosen else "float32")
        assert log.count("[precision_policy][INFO]") == 1  # no optimizer steps, so there is nothing to confirm
        assert log.count("[precision_policy][WARNING]") == chosen


@pytest.mark.parametrize(("stage", "builds_its_own"), [(0, False), (1, False), (1, True), (3, False)])
def test_deepspeed(application, stage, builds_its_own):
    """The engine builds or gets a torch AdamW over bf16 and then swaps its own fp32 copies in: the warning is taken back."""
    train = application("deepspeed")
    words = ["model.torch_dtype=bfloat16", f"stage={stage}", f"builds_its_own={builds_its_own}"]
    run = train("+precision_policy=on", *words, python=torchrun(1))
    assert run.levels.count("WARNING") == 1
    assert "INFO precision_policy=on: warning taken back" in run.log
    strict = train("+precision_policy=strict", *words, python=torchrun(1))
    assert set(strict.levels) == {"INFO"}
