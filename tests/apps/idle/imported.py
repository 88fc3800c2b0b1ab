"""The application, and which modules of the policy and of torch it has imported in the end."""

import runpy
import sys

runpy.run_path("app.py", run_name="__main__")
print(*sorted(name for name in sys.modules if name.startswith(("precision_policy", "torch"))))
