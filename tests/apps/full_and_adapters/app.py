"""Two models in one job: one is trained in full, of the other its adapters."""

import hydra
import torch
from torch import nn


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(64, 64).bfloat16().requires_grad_(False)
        self.adapter = nn.Linear(64, 64)

    def forward(self, x):
        return self.base(x.bfloat16()).float() + self.adapter(x)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    for model in (nn.Sequential(nn.Linear(64, 64)), Adapted()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        output = model(torch.randn(32, 64))
        print(type(model).__name__, "ROUNDED", torch.equal(output, output.bfloat16().float()))


if __name__ == "__main__":
    main()
