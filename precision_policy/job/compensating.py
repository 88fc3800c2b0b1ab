"""The second way out: bf16 storage with an optimizer that carries on what rounding dropped."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim import Adam, AdamW, Optimizer

_NOT_ARGUMENTS = ("_target_", "_partial_", "_convert_", "_recursive_")


def line(optimizer: Optimizer, path: str, compose: Callable[[list[str]], DictConfig]) -> str | None:
    """The overrides that put torch-optimi's optimizer of the same name into the config, tried; None where there are none.

    Args:
        optimizer: the one that would lose updates.
        path: the dotted path of its node in the config.
        compose: composes the job's config with further overrides.
    """
    name = {Adam: "Adam", AdamW: "AdamW"}.get(type(optimizer))
    if name is None or importlib.util.find_spec("optimi") is None:
        return None
    node = OmegaConf.select(compose([]), path)
    if not isinstance(node, DictConfig) or not str(node.get("_target_", "")).startswith("torch.optim."):
        return None
    replacement = getattr(importlib.import_module("optimi"), name)
    takes = inspect.signature(replacement).parameters
    given = [str(key) for key in node if key not in _NOT_ARGUMENTS]
    # These choose among torch's own implementations. Any other argument that is not taken changes what is computed.
    refused = [key for key in given if key not in takes]
    if not set(refused) <= {"fused", "capturable", "maximize", "differentiable"} or node.get("maximize"):
        return None
    words = [f"{path}._target_=optimi.{name}", *(f"~{path}.{key}" for key in refused)]
    tried: Any = OmegaConf.select(compose(words), path)
    arguments = {key: tried[key] for key in tried if key not in _NOT_ARGUMENTS and key != "params"}
    replacement([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], **arguments)
    return " ".join(words)
