"""Trains one bf16 weight, or an fp32 one where the config says so, and prints its config and the policy's record."""

import json

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import torch

    named = cfg.get("model") and cfg.model.get("torch_dtype")
    dtype = torch.float32 if named == "float32" else torch.bfloat16
    weights = torch.nn.Parameter(torch.ones(8, 8, dtype=dtype))
    make = hydra.utils.instantiate(cfg.optimizer) if cfg.get("optimizer") else torch.optim.AdamW
    optimizer = make([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))
    record = OmegaConf.select(HydraConfig.get(), "precision_policy")
    print("RECORD " + json.dumps(record and OmegaConf.to_container(record)))


if __name__ == "__main__":
    main()
