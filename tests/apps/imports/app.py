"""Composes and tells which modules that brought in."""

import sys
import warnings

from hydra import compose, initialize

warnings.simplefilter("ignore")
with initialize("conf", version_base="1.3"):
    compose("config")
    before = set(sys.modules)
    compose("config", overrides=[word for word in sys.argv[1:] if not word.startswith("hydra.run.dir")])
print("IMPORTED", *sorted(set(sys.modules) - before))
