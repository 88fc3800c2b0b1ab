"""Composes by the Compose API, then makes the object of a typed schema."""

import sys
from dataclasses import dataclass, field

from hydra import compose, initialize
from omegaconf import OmegaConf


@dataclass
class Model:
    path: str = ""
    dtype: str | None = None


@dataclass
class Optimizer:
    _target_: str = ""


@dataclass
class Trial:
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)


with initialize("conf", version_base="1.3"):
    cfg = compose("trial", overrides=[word for word in sys.argv[1:] if not word.startswith("hydra.")])
print(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Trial), cfg)))
