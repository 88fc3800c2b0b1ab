"""Fine-tunes a model by accelerate."""

import hydra
import torch
from accelerate import Accelerator
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    print("STORAGE", next(model.parameters()).dtype)
    accelerator = Accelerator(cpu=True, mixed_precision=cfg.mixed_precision)
    model, optimizer = accelerator.prepare(model, instantiate(cfg.optimizer)(model.parameters()))
    for _ in range(2):
        batch = torch.randint(0, 200, (2, 16))
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
