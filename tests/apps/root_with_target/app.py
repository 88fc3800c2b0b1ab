"""Instantiates its whole config: every key at the root is an argument."""

import hydra
from hydra.utils import instantiate


class Experiment:
    def __init__(self, model, optimizer):
        print("MADE", model["torch_dtype"])


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    instantiate(cfg)


if __name__ == "__main__":
    main()
