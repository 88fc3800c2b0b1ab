"""Imports what reads the environment inside the job only."""

import hydra
from hydra.utils import instantiate


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    instantiate(cfg.model)
    import place

    print("CACHE", place.CACHE)


if __name__ == "__main__":
    main()
