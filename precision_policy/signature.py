"""Whether a model's ``_target_`` takes a dtype keyword, so that adding one cannot crash the call."""

from __future__ import annotations

import contextlib
import inspect
import io
import pkgutil

from precision_policy import targets
from precision_policy.decision import Room


def room_in(target: str, keys: tuple[str, ...]) -> Room:
    """Which dtype key, if any, can be added to a node that calls ``target``; the path is the key's bare name.

    Args:
        target: dotted path of the callable. It is imported, unless its last part alone answers.
        keys: the names to look for, the one to add to a ``**kwargs`` last.
    """
    if targets.is_factory(target):
        return Room(keys[-1])
    if target.startswith("torch."):
        return Room(None, f"{target} takes a torch.dtype at most, not its name, so no dtype key was added")
    try:
        # Whatever the module prints while it is imported would land in the output of --cfg job.
        with contextlib.redirect_stdout(io.StringIO()):
            parameters = inspect.signature(pkgutil.resolve_name(target)).parameters.values()
    except (Exception, SystemExit) as error:  # importing is running the application's code: it may raise anything
        return Room(None, f"{target} could not be inspected ({type(error).__name__}), so no dtype key was added")
    for parameter in parameters:
        if parameter.name in keys:
            if _takes_only_objects(parameter):
                return Room(None, f"{target} takes a torch.dtype, not its name, so no dtype key was added")
            return Room(parameter.name)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return Room(keys[-1])
    return Room(None, f"{target} takes neither {' nor '.join(keys)}, and adding one would crash it")


def _takes_only_objects(parameter: inspect.Parameter) -> bool:
    """Whether the annotation admits a ``torch.dtype`` and no string."""
    annotation = str(parameter.annotation)
    return "torch.dtype" in annotation and "str" not in annotation
