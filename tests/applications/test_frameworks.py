"""The promise is any Hydra application: real frameworks, each as its own users run it."""

from textwrap import dedent

import pytest
from conftest import CONFIG

pytestmark = pytest.mark.once

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

PEFT = """
    if cfg.lora.r:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=cfg.lora.r, target_modules=["q_proj"]))
    optimizer = instantiate(cfg.optimizer)([p for p in model.parameters() if p.requires_grad])
    batch = data()[0]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()

main()
"""


@pytest.mark.parametrize("body", [LOOP, TRAINER, ACCELERATE], ids=["loop", "trainer", "accelerate"])
def test_full_fine_tune(app, checkpoint, body):
    """As is, a warning would be due; switched on, fp32 storage and silence; insisting on bf16, one warning."""
    train = app(LOAD.format(checkpoint=checkpoint), HEAD + body)
    on = train("+precision_policy=on")
    assert "STORAGE torch.float32" in on.out
    assert "WARNING" not in on.log
    insisted = train("+precision_policy=on", "+model.torch_dtype=bfloat16")
    assert "STORAGE torch.bfloat16" in insisted.out
    assert insisted.log.count("WARNING") == 1


def test_lora(app, checkpoint):
    """LoRA on a bf16 base is silent and untouched; a LoRA block that is off is a full fine-tune."""
    train = app(LOAD.format(checkpoint=checkpoint), HEAD + PEFT)
    on = train("+precision_policy=on", "precision_policy.peft=lora", "lora.r=4")
    assert "STORAGE torch.bfloat16" in on.out
    assert on.log.count("\n") == 0
    assert "nothing set (peft)" in on.log
    assert "STORAGE torch.float32" in train("+precision_policy=on", "precision_policy.peft=lora").out


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
# The layout of the popular template of Hydra with Lightning: everything of the training inside the module's node.
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


@pytest.mark.parametrize(("precision", "warnings"), [("32-true", 0), ("bf16-mixed", 0), ("bf16-true", 1)])
def test_lightning(app, checkpoint, precision, warnings):
    """bf16-true recasts the model after the policy asked for fp32: the warning says that instead."""
    train = app(LIGHTNING_CONFIG.format(checkpoint=checkpoint), LIGHTNING)
    paths = ["precision_policy.model=model.net", "precision_policy.optimizer=model.optimizer"]
    run = train("+precision_policy=on", *paths, f"trainer.precision={precision}")
    assert "INFO precision_policy=on: model.net.torch_dtype: unset -> float32" in run.log
    assert run.log.count("WARNING") == warnings
    if not warnings:
        computed = "fp32" if precision == "32-true" else "bf16"
        assert f"21 trainable tensors, 492,160 elements: stored in fp32, computed in {computed}" in run.log
    if warnings:
        assert "in the config: trainer.precision=32-true" in run.out
    if warnings:
        assert (
            "WARNING precision_policy=on: model.net.torch_dtype=float32 asked for fp32 storage, but 21 of 21 tensors came in bf16"
            in run.log
        )


def test_lightning_ddp(app, checkpoint):
    """Lightning starts its second rank with the same command: the same decision, and one voice."""
    train = app(LIGHTNING_CONFIG.format(checkpoint=checkpoint), LIGHTNING)
    paths = ["precision_policy.model=model.net", "precision_policy.optimizer=model.optimizer"]
    on = train("+precision_policy=on", *paths, "+trainer.strategy=ddp", "+trainer.devices=2")
    assert [line.split()[0] for line in on.log.splitlines()] == ["INFO", "INFO"]
    assert "21 trainable tensors, 492,160 elements: stored in fp32, computed in fp32" in on.log
    assert "model.net.torch_dtype: unset -> float32" in on.log
    insists = ["+model.net.torch_dtype=bfloat16", "+trainer.strategy=ddp", "+trainer.devices=2"]
    run = train("+precision_policy=on", *paths, *insists)
    assert [line.split()[0] for line in run.log.splitlines()] == ["INFO", "WARNING"]


ZEN = """
import torch
from hydra_zen import builds, store, zen

def model(torch_dtype=None):
    return torch.nn.Linear(4, 4, dtype=getattr(torch, torch_dtype or "bfloat16"))

def train(model, optimizer):
    optimizer(model.parameters())
    print("STORAGE", model.weight.dtype)

store(builds(train, model=builds(model, populate_full_signature=True),
             optimizer=builds(torch.optim.AdamW, zen_partial=True, lr=1e-5)), name="train")
if __name__ == "__main__":
    store.add_to_hydra_store()
    zen(train).hydra_main(config_name="train", config_path=None, version_base="1.3")
"""


def test_hydra_zen(app):
    """An application without YAML and with a typed root, the policy switched on by override."""
    train = app(code=ZEN)
    assert "STORAGE torch.bfloat16" in train().out
    on = train("+precision_policy=on")
    assert "STORAGE torch.float32" in on.out
    assert "model.torch_dtype: unset -> float32" in on.log


def test_a_sweep_whose_second_job_fails(app):
    """The failure ends the sweep as it would without the policy; the job before it and torch are unharmed."""
    code = dedent("""
        import hydra, torch
        @hydra.main(version_base='1.3', config_path='conf', config_name='config')
        def main(cfg):
            torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
            assert cfg.model.torch_dtype == 'float32', 'second job'
        main()
    """)
    run = app(CONFIG, code)("--multirun", "+precision_policy=on", "model.torch_dtype=auto,bfloat16", status=1)
    assert run.log.count("WARNING") == 2
    assert "second job" in run.err


ONE_AFTER_ANOTHER = """
import sys
import hydra, torch

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])

before = torch.optim.Optimizer.__init__
for option in ("warn", "strict", "off", "on"):
    print("JOB", option, flush=True)
    sys.argv[1:] = [f"+precision_policy={option}", "model.torch_dtype=bfloat16", "hydra.run.dir=out"]
    try:
        main()
    except SystemExit as stopped:
        print("STOPPED", stopped.code)
    assert torch.optim.Optimizer.__init__ is before
"""


def test_two_policies_in_one_process(app):
    """Each job is judged by its own option, whatever the one before it was."""
    run = app(CONFIG, ONE_AFTER_ANOTHER)()
    jobs = {part.split()[0]: part for part in run.out.split("JOB ")[1:]}
    warned = {option: part.count("[precision_policy][WARNING]") for option, part in jobs.items()}
    assert warned == {"warn": 1, "strict": 0, "off": 0, "on": 1}
    assert "STOPPED 1" in jobs["strict"]
    assert "Bf16AdamError: precision_policy=strict: torch.optim.AdamW over bf16 weights" in run.err
