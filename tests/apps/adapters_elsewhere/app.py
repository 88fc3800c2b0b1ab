"""Trains bf16 adapters, whose block stands far from the model's node."""

import hydra
import torch
from hydra.utils import instantiate


def make(torch_dtype):
    model = torch.nn.Linear(16, 16).to(getattr(torch, torch_dtype)).requires_grad_(False)
    model.adapter = torch.nn.Parameter(torch.ones(16, 2, dtype=model.weight.dtype))
    return model


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = instantiate(cfg.zoo.backbone)
    optimizer = instantiate(cfg.recipe.optimizer, [model.adapter])
    (model(torch.ones(1, 16).bfloat16()) @ model.adapter).sum().backward()
    optimizer.step()
    print("TRAINED")


if __name__ == "__main__":
    main()
