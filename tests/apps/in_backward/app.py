"""An optimizer for each parameter, stepped as soon as its gradient is there."""

import hydra
import torch
from torch import nn


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)]).to(torch.bfloat16)
    optimizers = {p: torch.optim.AdamW([p], lr=1e-5, foreach=False) for p in model.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    model(torch.randn(4, 64, dtype=torch.bfloat16)).pow(2).mean().backward()


if __name__ == "__main__":
    main()
