"""Does nothing but show its config."""

import json

import hydra
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))


if __name__ == "__main__":
    main()
