"""Makes an optimizer of one weight; its objective is the learning rate."""

import hydra
import torch


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    dtype = torch.float32 if cfg.model.torch_dtype == "float32" else torch.bfloat16
    hydra.utils.instantiate(cfg.optimizer)([torch.nn.Parameter(torch.ones(8, 8, dtype=dtype))])
    return cfg.optimizer.lr


if __name__ == "__main__":
    main()
