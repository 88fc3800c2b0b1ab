"""The policy's two functions for code that calls them by hand.

A drop-in for the module of the same name in NeMo Automodel (``nemo_automodel.components.optim.precision_warnings``, which
has withdrawn the first of the two): one import line changes, every name stays, the underscored ones too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from precision_policy.composition import targets
from precision_policy.job import ranks

if TYPE_CHECKING:  # importing torch takes a second, and every Hydra application on the machine imports this module
    import torch
    from torch.optim import Optimizer

_TORCH_ADAM_TARGETS = targets.TORCH_ADAM_TARGETS
_WARNED_CONTEXTS: set[str] = set()
_DTYPE_RESOLVED_CONTEXTS: set[str] = set()
_LOG = logging.getLogger("precision_policy")


def resolve_storage_dtype(
    cfg_model: Any, cfg_opt: Any, is_peft: bool = False, context: str = "recipe", logger: logging.Logger | None = None
) -> None:
    """Set ``torch_dtype`` on the model's config to ``"float32"`` when nobody chose a dtype and all parameters train.

    Changes nothing when there is no model config, under PEFT, for an optimizer that is not from ``torch.optim`` (others
    may keep an fp32 master copy), and where ``torch_dtype`` or ``dtype`` holds anything but None or ``"auto"``. Changes
    the config on every rank, says so at INFO on rank zero only, once per context. Calling it again changes nothing.

    Args:
        cfg_model: the model's config: a mapping, a DictConfig (struct and read-only too), or an object with attributes.
        cfg_opt: the optimizer's config, with a ``_target_`` that is a dotted path or the class itself.
        is_peft: whether only adapters train.
        context: what the log line is about; one line per context.
        logger: where to log; the logger ``precision_policy`` by default.
    """
    if cfg_model is None or is_peft or not _is_torch_optim_config(cfg_opt):
        return
    before = [_get_cfg_attr(cfg_model, key) for key in ("torch_dtype", "dtype")]
    if any(value is not None and not (isinstance(value, str) and value == "auto") for value in before):
        return
    _set_cfg_attr(cfg_model, "torch_dtype", "float32")
    if context not in _DTYPE_RESOLVED_CONTEXTS and _is_rank_zero():
        _DTYPE_RESOLVED_CONTEXTS.add(context)
        (logger or _LOG).info(
            "%s: torch_dtype: %s -> float32: %s keeps no fp32 master copy (keep bf16: torch_dtype=bfloat16)",
            context,
            before[0] or "unset",
            targets.dotted(_get_cfg_attr(cfg_opt, "_target_")),
        )


def warn_if_torch_adam_with_bf16_params(
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    optimizer_cfg: Any = None,
    parameters: Iterable[torch.Tensor] | None = None,
    is_peft: bool = False,
    context: str = "recipe",
    logger: logging.Logger | None = None,
) -> None:
    """Warn on rank zero, once per context, when a torch Adam or AdamW holds trainable bf16 parameters.

    Args:
        optimizer: the optimizer, or several; a subclass of torch's Adam or AdamW counts.
        optimizer_cfg: its config, for when there is no optimizer yet: the ``_target_`` is judged by its name.
        parameters: the parameters to look at; those in the optimizers' ``param_groups`` by default.
        is_peft: whether only adapters train; then nothing is said.
        context: what the warning is about; one warning per context.
        logger: where to warn; the logger ``precision_policy`` by default.
    """
    if is_peft or context in _WARNED_CONTEXTS or not _is_rank_zero():
        return
    if isinstance(optimizer, Iterator):  # it is walked twice below
        optimizer = list(optimizer)
    if not (_is_torch_adam_optimizer(optimizer) or _is_torch_adam_config(optimizer_cfg)):
        return
    if not _has_trainable_bf16_param(_iter_optimizer_params(optimizer) if parameters is None else parameters):
        return
    _WARNED_CONTEXTS.add(context)
    (logger or _LOG).warning(
        "%s: torch Adam/AdamW holds trainable bf16 parameters and keeps no fp32 master copy: updates under half a bf16 "
        "step of a weight are rounded away. Fix: load the model with torch_dtype=float32 (compute may stay bf16, by "
        "autocast or FSDP mixed precision).",
        context,
    )


def _get_cfg_attr(cfg: Any, key: str) -> Any:
    """The value of a key of a mapping or an attribute of an object; None where there is none or it is ``???``."""
    if isinstance(cfg, (Mapping, DictConfig)):
        return cfg.get(key)
    return getattr(cfg, key, None)


def _set_cfg_attr(cfg: Any, key: str, value: Any) -> None:
    """Set a key of a mapping or an attribute of an object."""
    if isinstance(cfg, DictConfig):
        from precision_policy.composition import config_tree

        config_tree.write(cfg, key, value)
    elif isinstance(cfg, MutableMapping):
        cfg[key] = value
    else:
        setattr(cfg, key, value)


def _is_rank_zero() -> bool:
    """Whether this process is the one that speaks."""
    return ranks.is_rank_zero()


def _is_torch_optim_config(optimizer_cfg: Any) -> bool:
    """Whether the config's ``_target_`` names an optimizer that ships in ``torch.optim``."""
    return targets.is_torch_optim(targets.dotted(_get_cfg_attr(optimizer_cfg, "_target_")))


def _is_torch_adam_config(optimizer_cfg: Any) -> bool:
    """Whether the config's ``_target_`` names torch's Adam or AdamW."""
    return targets.dotted(_get_cfg_attr(optimizer_cfg, "_target_")) in _TORCH_ADAM_TARGETS


def _is_torch_adam_optimizer(optimizer: Any) -> bool:
    """Whether it is, or any of several is, a torch Adam or AdamW or a subclass."""
    if optimizer is None:
        return False
    import torch

    return any(isinstance(one, (torch.optim.Adam, torch.optim.AdamW)) for one in _each(optimizer))


def _iter_optimizer_params(optimizer: Any) -> Iterator[torch.Tensor]:
    """The parameters in the groups of one optimizer or several; none for None."""
    for one in [] if optimizer is None else _each(optimizer):
        for group in one.param_groups:
            yield from group["params"]


def _has_trainable_bf16_param(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether any parameter that requires grad is stored in bf16."""
    import torch

    from precision_policy.estimate.parameters import trainable

    return bool(trainable(parameters, (torch.bfloat16,)))


def _each(optimizer: Any) -> Iterable[Any]:
    return [optimizer] if hasattr(optimizer, "param_groups") else optimizer
