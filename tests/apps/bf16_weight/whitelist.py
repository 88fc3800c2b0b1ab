"""Names what its config may instantiate, as Hydra 1.4 lets it."""

import hydra


@hydra.main(execution_whitelist=["torch.*"], config_path="conf", config_name="config")
def main(cfg):
    hydra.utils.instantiate(cfg.optimizer)


if __name__ == "__main__":
    main()
