"""Models whose dtype is typed: as text, as an enum, or not there at all."""

import enum
import json
from dataclasses import dataclass, field
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


class Storage(enum.Enum):
    float32 = 1
    bf16 = 2


@dataclass
class Text:
    torch_dtype: str | None = None


@dataclass
class Enumerated:
    torch_dtype: Storage | None = None


@dataclass
class Bits:
    torch_dtype: int | None = None


@dataclass
class Bare:
    size: int = 1


def root(model):
    @dataclass
    class Root:
        model: Any = field(default_factory=model)
        optimizer: Any = field(default_factory=lambda: {"_target_": "torch.optim.AdamW"})

    return Root


for name, model in {"text": Text, "enum": Enumerated, "bits": Bits, "bare": Bare}.items():
    ConfigStore.instance().store(name, root(model))


@hydra.main(version_base="1.3", config_name="text")
def main(cfg):
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))
    print("RECORD " + json.dumps(OmegaConf.to_container(HydraConfig.get().precision_policy)))


if __name__ == "__main__":
    main()
