"""A body and a head, with an optimizer each."""

import hydra
import torch
from torch import nn


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    body = nn.Linear(256, 256).to(torch.bfloat16)
    head = nn.Linear(256, 8).to(torch.bfloat16)
    optimizers = [torch.optim.AdamW(head.parameters(), lr=0.1), torch.optim.AdamW(body.parameters(), lr=1e-6)]
    for _ in range(3):
        head(body(torch.randn(16, 256, dtype=torch.bfloat16))).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
