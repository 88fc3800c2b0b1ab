"""Fine-tunes a model, or adapters of it by peft, as the rank says."""

import hydra
import torch
from hydra.utils import instantiate
from peft import LoraConfig, get_peft_model


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    print("STORAGE", next(model.parameters()).dtype)
    if cfg.lora.r:
        model = get_peft_model(model, LoraConfig(r=cfg.lora.r, target_modules=["q_proj"]))
    optimizer = instantiate(cfg.optimizer)([p for p in model.parameters() if p.requires_grad])
    batch = torch.randint(0, 200, (2, 16))
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
