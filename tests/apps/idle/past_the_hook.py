"""The application under a Hydra that composes past the hook."""

import runpy

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins

composes = ConfigLoaderImpl._load_configuration_impl
Plugins.instance()  # installs the hook
ConfigLoaderImpl._load_configuration_impl = composes
runpy.run_path("app.py", run_name="__main__")
