"""Configures logging by itself, which disables all loggers that exist by then."""

import logging.config

import hydra
import torch

FILE = """
[loggers]
keys=root
[handlers]
keys=console
[formatters]
keys=
[logger_root]
level=INFO
handlers=console
[handler_console]
class=StreamHandler
args=()
"""
DICT = {
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    if cfg.by == "dict":
        logging.config.dictConfig(DICT)
    else:
        with open("logging.ini", "w") as file:
            file.write(FILE)
        logging.config.fileConfig("logging.ini")
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=1e-5)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    logging.getLogger("application").info("the application goes on")


if __name__ == "__main__":
    main()
