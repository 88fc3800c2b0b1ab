"""What Hydra discovers. Keep it light: every Hydra application on the machine imports this, policy on or off."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from precision_policy.hydra_hook import PROVIDER, install

# At import, not in the method below: a launcher's worker process unpickles this class and never calls it.
_INSTALLED = install()


class PrecisionPolicyPlugin(SearchPathPlugin):
    """Puts the config group ``precision_policy`` on the search path, after the application's own folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append, so that options of the same name in the application win.

        On a Hydra that the hook does not fit, the options are others: choosing one is an error that says so.
        """
        options = "precision_policy.conf" if _INSTALLED else "precision_policy.unsupported"
        search_path.append(PROVIDER, f"pkg://{options}")
