"""The application under a Hydra that the hook does not fit."""

import runpy

from precision_policy import hydra_hook

hydra_hook.install = lambda: False
runpy.run_path("app.py", run_name="__main__")
