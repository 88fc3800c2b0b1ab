"""Takes from Hydra one of the things that the hook needs, installs the hook and tells whether it was."""

import sys

import hydra._internal.callbacks
import hydra._internal.config_loader_impl  # noqa: F401 - what a test takes away is there first


def no_config_loader():
    sys.modules["hydra._internal.config_loader_impl"] = None


def no_config_repository():
    sys.modules["hydra._internal.config_repository"] = None


def no_start_of_a_job():
    from hydra._internal.callbacks import Callbacks

    del Callbacks.on_job_start


def another_name_for_loading():
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    ConfigLoaderImpl.renamed = ConfigLoaderImpl._load_single_config
    del ConfigLoaderImpl._load_single_config


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    from precision_policy.hydra_hook import install

    print("INSTALLED", install())
