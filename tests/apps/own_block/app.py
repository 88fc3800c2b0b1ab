"""Has settings of the policy in its own config, and reads them."""

import json

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print("TITLE", cfg.title)
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))
    record = OmegaConf.select(HydraConfig.get(), "precision_policy")
    print("RECORD " + json.dumps(record and OmegaConf.to_container(record)))


if __name__ == "__main__":
    main()
