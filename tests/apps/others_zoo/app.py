"""Instantiates a model of somebody's own zoo."""

import hydra
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    model = instantiate(cfg.model)
    instantiate(cfg.optimizer, model.parameters())
    print("STORED", *{parameter.dtype for parameter in model.parameters()})


if __name__ == "__main__":
    main()
