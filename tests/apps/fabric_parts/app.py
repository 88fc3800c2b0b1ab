"""Fabric wraps the parts of a model; the whole that calls them is a plain module."""

import hydra
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric


class Whole(torch.nn.Module):
    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x):
        hidden = self.first(x)
        print("BETWEEN", (x @ x.T).dtype)
        return self.last(hidden)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    whole = Whole(fabric.setup_module(torch.nn.Linear(8, 8)), fabric.setup_module(torch.nn.Linear(8, 1)))
    optimizer = fabric.setup_optimizers(instantiate(cfg.optimizer, whole.parameters()))
    for _ in range(2):
        fabric.backward(whole(torch.ones(4, 8)).sum())
        optimizer.step()


if __name__ == "__main__":
    main()
