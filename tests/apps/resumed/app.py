"""Trains a small bf16 model by a framework, saves after the first epoch, and goes on from a checkpoint where it is given one."""

import hashlib
from pathlib import Path

import hydra
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ROWS = torch.randint(0, 90, (6, 12), generator=torch.Generator().manual_seed(0))


def make_model():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=90,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def by_trainer(model, cfg):
    arguments = TrainingArguments(
        "trained",
        per_device_train_batch_size=2,
        num_train_epochs=2,
        max_steps=3 * cfg.epochs,
        save_steps=3,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ROWS])
    trainer.train(resume_from_checkpoint=cfg.checkpoint)
    return trainer.optimizer


def by_lightning(model, cfg):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    saving = lightning.pytorch.callbacks.ModelCheckpoint("trained", filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-true",
        max_epochs=cfg.epochs,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(ROWS, batch_size=2), ckpt_path=cfg.checkpoint)
    return trainer.optimizers[0]


def by_accelerate(model, cfg):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    first = 0
    if cfg.checkpoint:
        accelerator.load_state(cfg.checkpoint)
        first = 1
    for epoch in range(first, cfg.epochs):
        for batch in DataLoader(ROWS, batch_size=2):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(f"trained/epoch={epoch}")
    return optimizer.optimizer


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = make_model()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = {"trainer": by_trainer, "lightning": by_lightning, "accelerate": by_accelerate}[cfg.framework](model, cfg)
    digest = hashlib.sha256()
    moved = 0
    for param, old in zip(model.parameters(), before, strict=True):
        digest.update(param.detach().view(torch.int16).numpy().tobytes())
        for name, value in sorted(optimizer.state[param].items()):
            digest.update(name.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
        moved += int((param != old).sum())
    keys = sorted({name for entry in optimizer.state.values() for name in entry})
    print("DTYPES", sorted({str(param.dtype) for param in model.parameters()}), "KEYS", *keys)
    print("MOVED", moved)
    print("DIGEST", digest.hexdigest())
    print("SAVED", *sorted(map(str, Path("trained").iterdir())))


if __name__ == "__main__":
    main()
