"""Has options of its own in the policy's group, one that extends ours and one of another meaning; makes a bf16 weight's optimizer."""

import json

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))
    record = OmegaConf.select(HydraConfig.get(), "precision_policy")
    print("RECORD " + json.dumps(record and OmegaConf.to_container(record)))


if __name__ == "__main__":
    main()
