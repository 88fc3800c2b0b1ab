"""Storage-dtype policy for Hydra applications that train: sets fp32, warns about bf16 Adam, and shows what it decided.

The functions here are for code that calls the policy by hand; ``+precision_policy=on`` needs none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_policy.estimate.histogram import lost_updates
    from precision_policy.job.master_weights import fp32_weights, keep_master_weights
    from precision_policy.precision_warnings import resolve_storage_dtype, warn_if_torch_adam_with_bf16_params

__all__ = [
    "fp32_weights",
    "keep_master_weights",
    "lost_updates",
    "resolve_storage_dtype",
    "warn_if_torch_adam_with_bf16_params",
]


def __getattr__(name: str) -> Any:
    # On demand: every Hydra application on the machine imports this package when Hydra discovers its plugins.
    if name == "lost_updates":
        from precision_policy.estimate.histogram import lost_updates

        return lost_updates
    if name in ("fp32_weights", "keep_master_weights"):
        from precision_policy.job import master_weights

        return getattr(master_weights, name)
    if name in __all__:
        from precision_policy import precision_warnings

        return getattr(precision_warnings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
