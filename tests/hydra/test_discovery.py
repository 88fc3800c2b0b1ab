"""Discovery runs in every Hydra application on the machine: it must find the plugin and import nothing heavy."""

import subprocess
import sys

from conftest import ENVIRONMENT

HEAVY = "{'torch', 'numpy', 'transformers', 'precision_policy.composition.applying', 'precision_policy.job.arming'}"
DISCOVER = f"""
import sys
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
EXTRA
found = [kind.__name__ for kind in Plugins.instance().discover(SearchPathPlugin)]
assert "PrecisionPolicyPlugin" in found, found
print(sorted({HEAVY} & set(sys.modules)))
"""


def heavy(extra: str = "") -> str:
    code = DISCOVER.replace("EXTRA", extra)
    return subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_discovery_imports_nothing_heavy():
    assert heavy() == "[]"


def test_that_this_check_can_fail():
    """The same check sees torch where somebody imports it."""
    assert "torch" in heavy("import torch")


def test_a_job_without_the_policy_imports_none_of_it(application):
    imported = application("idle", "imported.py")(python=sys.executable).out.splitlines()[-1]
    assert imported == "precision_policy precision_policy.conf precision_policy.hydra_hook"


def test_the_package_itself_is_light():
    code = "import sys, precision_policy; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
