"""A language model, fine-tuned by a plain loop or a framework, with its own mixed precision or none."""

import hydra
import lightning
import torch
from hydra.utils import instantiate


def data(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 200, (2, 16), generator=generator) for _ in range(count)]


def loop(cfg, model):
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    for batch in data():
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulation(cfg, model):
    """Two backward passes a step, and sampling from the model in the end."""
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    for number, batch in enumerate(data()):
        model(input_ids=batch, labels=batch).loss.backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    print("SAMPLE", model.eval().generate(data()[0][:1], max_new_tokens=3, do_sample=False).shape)


def trainer(cfg, model):
    from transformers import Trainer, TrainingArguments

    bf16 = {"bf16": True} if cfg.precision == "bf16" else {}
    arguments = TrainingArguments("trainer", per_device_train_batch_size=1, max_steps=2, report_to=[], use_cpu=True, **bf16)
    rows = [{"input_ids": row, "labels": row} for batch in data() for row in batch]
    Trainer(model, arguments, train_dataset=rows).train()


def accelerate(cfg, model):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if cfg.precision == "bf16" else "no")
    model, optimizer = accelerator.prepare(model, instantiate(cfg.optimizer)(model.parameters()))
    for batch in data(2):
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()


class Automatic(lightning.LightningModule):
    def __init__(self, cfg, net):
        super().__init__()
        self.cfg, self.net = cfg, net

    def training_step(self, batch, index):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return instantiate(self.cfg.optimizer)(self.parameters())


class ByHand(Automatic):
    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
        optimizer.zero_grad()


def fit(cfg, module):
    precision = "bf16-mixed" if cfg.precision == "bf16" else "32-true"
    fitting = lightning.Trainer(accelerator="cpu", max_steps=2, precision=precision, barebones=True)
    fitting.fit(module, torch.utils.data.DataLoader(torch.randint(0, 200, (4, 16)), batch_size=2))


def lightning_automatic(cfg, model):
    fit(cfg, Automatic(cfg, model))


def lightning_by_hand(cfg, model):
    fit(cfg, ByHand(cfg, model))


def spawned(cfg, model):
    torch.multiprocessing.spawn(in_process, (cfg, model), nprocs=1)


def in_process(rank, cfg, model):
    inside = []
    model.lm_head.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    loop(cfg, model)
    print("INSIDE", inside[0], flush=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    globals()[cfg.way](cfg, instantiate(cfg.model))


if __name__ == "__main__":
    main()
