"""The promise is any Hydra application: real frameworks, each as its own users run it."""

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

class Net(lightning.LightningModule):
    def __init__(self, optimizer, torch_dtype=None):
        super().__init__()
        self.layer, self.optimizer = torch.nn.Linear(8, 8), optimizer
    def training_step(self, batch, index):
        return self.layer(batch).float().square().mean()
    def configure_optimizers(self):
        return self.optimizer(params=self.parameters())

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = hydra.utils.instantiate(cfg.model)
    dtype = torch.bfloat16 if cfg.precision == "bf16-true" else torch.float32
    trainer = lightning.Trainer(accelerator="cpu", max_steps=2, precision=cfg.precision, logger=False,
                                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(4, 8, dtype=dtype)))

main()
"""
LIGHTNING_CONFIG = """
precision: 32-true
model:
  _target_: __main__.Net
  torch_dtype: null
  optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 1.0e-5}
precision_policy: {optimizer: model.optimizer}
"""


@pytest.mark.parametrize(("precision", "warnings"), [("32-true", 0), ("bf16-mixed", 0), ("bf16-true", 1)])
def test_lightning(app, precision, warnings):
    """bf16-true recasts the model after the policy asked for fp32: the warning says that instead."""
    run = app(LIGHTNING_CONFIG, LIGHTNING)("+precision_policy=on", f"precision={precision}")
    assert "model.torch_dtype: unset -> float32" in run.log
    assert run.log.count("WARNING") == warnings
    if warnings:
        assert "model.torch_dtype=float32 asked for fp32 storage, but 2 of 2 tensors came in bf16" in run.log


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
    code = (
        "import hydra, torch\n@hydra.main(version_base='1.3', config_path='conf', config_name='config')\n"
        "def main(cfg):\n    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])\n"
        "    assert cfg.model.torch_dtype == 'float32', 'second job'\n"
        "main()\n"
    )
    run = app(CONFIG, code)("--multirun", "+precision_policy=on", "model.torch_dtype=auto,bfloat16", status=1)
    assert run.log.count("WARNING") == 2
    assert "second job" in run.err
