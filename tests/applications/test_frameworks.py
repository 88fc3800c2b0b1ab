"""The promise is any Hydra application: real frameworks, each as its own users run it."""

import pytest
from words import LOST, UNSEEN, not_as_asked, storage_set, trained

pytestmark = pytest.mark.once

IN_THE_MODULE = [
    "+precision_policy=on",
    "precision_policy.model=model.net",
    "precision_policy.optimizer=model.optimizer",
]
TENSORS, ELEMENTS = 21, 492_160  # of the demo's checkpoint


@pytest.mark.parametrize("name", ["loop", "trainer", "accelerated"])
def test_full_fine_tune(application, checkpoint, name):
    """As is, a warning would be due; switched on, fp32 storage and silence; insisting on bf16, one warning."""
    train = application(name, heavy=True)
    on = train("+precision_policy=on", f"checkpoint={checkpoint}")
    assert "STORAGE torch.float32" in on.out
    assert "WARNING" not in on.log
    insisted = train("+precision_policy=on", f"checkpoint={checkpoint}", "+model.torch_dtype=bfloat16")
    assert "STORAGE torch.bfloat16" in insisted.out
    assert insisted.levels.count("WARNING") == 1


def test_lora(application, checkpoint):
    """LoRA on a bf16 base is untouched, and told without a warning; a LoRA block that is off is a full fine-tune."""
    train = application("lora", heavy=True)
    words = ["+precision_policy=on", "precision_policy.peft=lora", f"checkpoint={checkpoint}"]
    on = train(*words, "lora.r=4")
    assert "STORAGE torch.bfloat16" in on.out
    assert on.levels == ["INFO", "INFO"]
    assert "nothing set (peft)" in on.log
    assert on.log.endswith(f"{trained(4, 2048, UNSEEN)}; {ELEMENTS:,} elements frozen, stored in bf16")
    assert "STORAGE torch.float32" in train(*words).out


@pytest.mark.parametrize(
    ("precision", "computed"), [("32-true", UNSEEN), ("bf16-mixed", "computed in bf16 by the application's autocast")]
)
def test_lightning(application, checkpoint, precision, computed):
    """What the policy set stays fp32; the line says what Lightning computes in."""
    train = application("lightning", heavy=True)
    run = train(*IN_THE_MODULE, f"checkpoint={checkpoint}", f"trainer.precision={precision}")
    assert storage_set("model.net.torch_dtype", "unset") in run.log
    assert run.levels == ["INFO", "INFO"]
    assert run.log.endswith(trained(TENSORS, ELEMENTS, computed))


def test_lightning_that_recasts_the_model(application, checkpoint):
    """bf16-true makes bf16 of the model that the policy asked for in fp32: that is said, and where it may come from."""
    train = application("lightning", heavy=True)
    run = train(*IN_THE_MODULE, f"checkpoint={checkpoint}", "trainer.precision=bf16-true")
    assert storage_set("model.net.torch_dtype", "unset") in run.log
    assert run.levels.count("WARNING") == 1
    assert not_as_asked("model.net.torch_dtype", TENSORS) in run.log
    assert "or a bf16-true precision setting" in run.log


DDP = ["+trainer.strategy=ddp", "+trainer.devices=2"]


def test_lightning_ddp_that_starts_its_second_rank(application, checkpoint):
    """Lightning starts it with the same command, in a fresh interpreter: the same decision, and one voice."""
    run = application("lightning", heavy=True)(*IN_THE_MODULE, *DDP, f"checkpoint={checkpoint}")
    assert run.levels == ["INFO", "INFO"]
    assert storage_set("model.net.torch_dtype", "unset") in run.log
    assert run.log.endswith(trained(TENSORS, ELEMENTS, UNSEEN))
    assert "Starting with 2 processes" in run.err


def test_lightning_ddp_that_finds_its_ranks(application, checkpoint):
    """A launcher has started both: one warning for a job that insists on bf16."""
    insists = "+model.net.torch_dtype=bfloat16"
    run = application("lightning", heavy=True)(*IN_THE_MODULE, *DDP, f"checkpoint={checkpoint}", insists, ranks=2)
    assert run.levels == ["INFO", "WARNING", "INFO"]
    assert "Starting with 2 processes" in run.err


def test_hydra_zen(application):
    """An application without YAML and with a typed root, the policy switched on by override."""
    train = application("zen", heavy=True)
    assert "STORAGE torch.bfloat16" in train().out
    on = train("+precision_policy=on")
    assert "STORAGE torch.float32" in on.out
    assert storage_set("model.torch_dtype", "unset") in on.log


def test_a_sweep_whose_second_job_fails(application):
    """The failure ends the sweep as it would without the policy; the job before it and torch are unharmed."""
    run = application("bf16_fails")("--multirun", "+precision_policy=on", "model.torch_dtype=auto,bfloat16", status=1)
    assert run.levels.count("WARNING") == 2
    assert "second job" in run.err


def test_four_policies_in_one_process(application):
    """Each job is judged by its own option, whatever the one before it was."""
    run = application("four_jobs")()
    jobs = {part.split()[0]: part for part in run.out.split("JOB ")[1:]}
    warned = {option: part.count("[precision_policy][WARNING]") for option, part in jobs.items()}
    assert warned == {"warn": 1, "strict": 0, "off": 0, "on": 1}
    assert "STOPPED 1" in jobs["strict"]
    assert f"Bf16AdamError: precision_policy=strict: {LOST}" in run.err
