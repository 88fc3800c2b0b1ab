"""The application where the package is not installed."""

import runpy
import sys
import warnings


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("precision_policy", "hydra_plugins.hydra_precision_policy")):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Block())
warnings.simplefilter("ignore")
runpy.run_path("app.py", run_name="__main__")
