"""Fine-tunes a model of transformers by a loop of its own."""

from contextlib import nullcontext

import hydra
import torch
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    print("STORAGE", next(model.parameters()).dtype)
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    for _ in range(cfg.steps):
        batch = torch.randint(0, 200, (2, 16))
        with torch.autocast("cpu", torch.bfloat16) if cfg.autocast else nullcontext():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
