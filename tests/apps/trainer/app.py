"""Fine-tunes a model by the Trainer of transformers, which makes the optimizer itself."""

import hydra
import torch
from hydra.utils import instantiate
from transformers import Trainer, TrainingArguments


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    print("STORAGE", next(model.parameters()).dtype)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 200, (8, 16))]
    arguments = TrainingArguments(**cfg.trainer, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()


if __name__ == "__main__":
    main()
