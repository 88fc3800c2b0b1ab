"""Trains one weight for a step: in bf16, unless its config says fp32."""

import json

import hydra
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import torch

    dtype = cfg.get("model") and cfg.model.get("torch_dtype")
    dtype = torch.float32 if dtype in ("float32", "fp32") else torch.bfloat16
    weights = torch.nn.Parameter(torch.ones(8, 8, dtype=dtype))
    make = hydra.utils.instantiate(cfg.optimizer) if cfg.get("optimizer") else torch.optim.AdamW
    optimizer = make([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))


if __name__ == "__main__":
    main()
