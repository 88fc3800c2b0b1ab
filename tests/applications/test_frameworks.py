"""The promise is any Hydra application: real frameworks, each as its own users run it."""

import pytest
from words import LOST, not_as_asked, storage_set, trained

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
    """LoRA on a bf16 base is silent and untouched; a LoRA block that is off is a full fine-tune."""
    train = application("lora", heavy=True)
    words = ["+precision_policy=on", "precision_policy.peft=lora", f"checkpoint={checkpoint}"]
    on = train(*words, "lora.r=4")
    assert "STORAGE torch.bfloat16" in on.out
    assert on.levels == ["INFO"]
    assert "nothing set (peft)" in on.log
    assert "STORAGE torch.float32" in train(*words).out


@pytest.mark.parametrize(("precision", "computed"), [("32-true", "computed in fp32"), ("bf16-mixed", "computed in bf16")])
def test_lightning(application, checkpoint, precision, computed):
    """What the policy set stays fp32; the line says what Lightning computes in."""
    train = application("lightning", heavy=True)
    run = train(*IN_THE_MODULE, f"checkpoint={checkpoint}", f"trainer.precision={precision}")
    assert storage_set("model.net.torch_dtype", "unset") in run.log
    assert run.levels == ["INFO", "INFO"]
    assert trained(TENSORS, ELEMENTS, computed) in run.log


def test_lightning_that_recasts_the_model(application, checkpoint):
    """bf16-true makes bf16 of the model that the policy asked for in fp32: the warning says that, and where it may come from."""
    train = application("lightning", heavy=True)
    run = train(*IN_THE_MODULE, f"checkpoint={checkpoint}", "trainer.precision=bf16-true")
    assert storage_set("model.net.torch_dtype", "unset") in run.log
    assert run.levels.count("WARNING") == 1
    assert not_as_asked("model.net.torch_dtype", TENSORS) in run.log
    assert "in the config: trainer.precision=32-true" in run.out


DDP = ["+trainer.strategy=ddp", "+trainer.devices=2"]


def test_lightning_ddp_that_starts_its_second_rank(application, checkpoint):
    """Lightning starts it with the same command, in a fresh interpreter: the same decision, and one voice."""
    run = application("lightning", heavy=True)(*IN_THE_MODULE, *DDP, f"checkpoint={checkpoint}")
    assert run.levels == ["INFO", "INFO"]
    assert storage_set("model.net.torch_dtype", "unset") in run.log
    assert trained(TENSORS, ELEMENTS, "computed in fp32") in run.log
    assert "Starting with 2 processes" in run.err


def test_lightning_ddp_that_finds_its_ranks(application, checkpoint):
    """A launcher has started both: one warning for a job that insists on bf16."""
    insists = "+model.net.torch_dtype=bfloat16"
    run = application("lightning", heavy=True)(*IN_THE_MODULE, *DDP, f"checkpoint={checkpoint}", insists, ranks=2)
    assert run.levels == ["INFO", "WARNING"]
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


# The applications above as strings, until tests/job takes the files: then these go.
LOAD = """
model:
  _target_: transformers.AutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: {checkpoint}
optimizer:
  _target_: torch.optim.AdamW
  _partial_: true
  lr: 1.0e-5
lora: {{r: 0}}
"""
HEAD = """
import hydra, torch
from hydra.utils import instantiate

def data(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 200, (2, 16), generator=generator) for _ in range(count)]

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = instantiate(cfg.model)
    print("STORAGE", next(model.parameters()).dtype)
"""
LOOP = """
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    for batch in data():
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

main()
"""
TRAINER = """
    from transformers import Trainer, TrainingArguments
    arguments = TrainingArguments("out/trainer", per_device_train_batch_size=1, max_steps=2, report_to=[], use_cpu=True, learning_rate=1e-5)
    rows = [{"input_ids": row, "labels": row} for batch in data() for row in batch]
    Trainer(model, arguments, train_dataset=rows).train()

main()
"""
ACCELERATE = """
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, instantiate(cfg.optimizer)(model.parameters()))
    for batch in data(2):
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()

main()
"""
LIGHTNING = """
import hydra, lightning, torch
from hydra.utils import instantiate

class Module(lightning.LightningModule):
    def __init__(self, net, optimizer, scheduler):
        super().__init__()
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
    def training_step(self, batch, index):
        return self.net(input_ids=batch, labels=batch).loss
    def configure_optimizers(self):
        optimizer = self.optimizer(params=self.trainer.model.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer=optimizer)}

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model, trainer = instantiate(cfg.model), instantiate(cfg.trainer)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randint(0, 200, (4, 16)), batch_size=2))

main()
"""
LIGHTNING_CONFIG = """
model:
  _target_: __main__.Module
  optimizer: {{_target_: torch.optim.AdamW, _partial_: true, lr: 1.0e-5}}
  scheduler: {{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1}}
  net:
    _target_: transformers.AutoModelForCausalLM.from_pretrained
    pretrained_model_name_or_path: {checkpoint}
trainer: {{_target_: lightning.Trainer, accelerator: cpu, max_steps: 2, precision: 32-true, logger: false,
          enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false}}
"""
