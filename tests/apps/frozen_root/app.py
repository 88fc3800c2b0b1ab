"""A root that is a frozen dataclass: read-only, and made an object of."""

from dataclasses import dataclass, field
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


@dataclass(frozen=True)
class Root:
    rate: float = 1e-4
    net: Any = field(default_factory=lambda: {"dtype": None})
    optimizer: Any = field(default_factory=lambda: {"_target_": "torch.optim.AdamW"})


ConfigStore.instance().store("root", Root)


@hydra.main(version_base="1.3", config_name="root")
def main(cfg):
    assert OmegaConf.is_readonly(cfg)
    root = OmegaConf.to_object(cfg)
    print("ROOT", type(root).__name__, root.rate, root.net)


if __name__ == "__main__":
    main()
