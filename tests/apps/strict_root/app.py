"""Takes its config apart in the ways that accept no key which the application did not write."""

from dataclasses import dataclass, field
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import OmegaConf


@dataclass
class Schema:
    net: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)


class Whole:
    def __init__(self, net, optim):
        self.dtype = net["dtype"]


def train(net, optim):
    return net["dtype"]


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print("SPLAT", train(**cfg))
    print("MERGED", OmegaConf.merge(OmegaConf.structured(Schema), cfg).net["dtype"])
    print("WHOLE", instantiate({"_target_": "__main__.Whole", **cfg, "_recursive_": False}).dtype)
    print("KEYS", *cfg)


if __name__ == "__main__":
    main()
