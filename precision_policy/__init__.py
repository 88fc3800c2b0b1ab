"""Storage-dtype policy for Hydra applications that train: sets fp32, warns about bf16 Adam, and shows what it decided.

The functions here are for code that calls the policy by hand; ``+precision_policy=on`` needs none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_policy.estimate.histogram import lost_updates
    from precision_policy.precision_warnings import resolve_storage_dtype, warn_if_torch_adam_with_bf16_params

_HOMES = {"lost_updates": "estimate.histogram"}
__all__ = ["lost_updates", "resolve_storage_dtype", "warn_if_torch_adam_with_bf16_params"]


def __getattr__(name: str) -> Any:
    # On demand: every Hydra application on the machine imports this package when Hydra discovers its plugins.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'precision_warnings')}"), name)
