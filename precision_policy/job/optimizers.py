"""What known optimizers keep beside the parameter: by what they do and not by where they live.

Each entry was read in the source that it names. An optimizer that is not here is not judged: nothing is known of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch.optim import Optimizer

Keeps = Literal["nothing", "master", "compensation"]

# Families that hold optimizers of every kind are judged only where the class's own name says that it is one of these: the
# update of SGD, say, is of the size of its gradient, and nothing is known of what it loses.
_ADAM_LIKE = re.compile(r"Adam|AdEMAMix|Adan|Lion", re.IGNORECASE)

_ENGINES = ("deepspeed", "megatron")

# Each of these arguments of a parameter group, where it is set, adds one state of the size of the parameter.
_ADDS_A_STATE = ("amsgrad", "momentum", "centered")


@dataclass(frozen=True)
class Known:
    """An optimizer family.

    Attributes:
        base: dotted path of the class that all of the family derive from; torch's own one level up, as users write it.
        keeps: what one of them keeps over parameters of a 16-bit dtype.
        state_grows: by how many bytes per element its state grows when storage goes from 16 to 32 bits, without the options
            that add a state; None where it was not counted.
        source: where this was read, with the version.
        at_first_step: whether only the first step tells: an engine may swap in fp32 copies after the construction, or the
            constructor stores its arguments only after torch's own, inside it, has made the parameter groups.
        known_size: whether the first update is lr for every element, so that the share it loses can be told.
        mixed: whether the family also holds optimizers that are not like Adam.
    """

    base: str
    keeps: Callable[[Optimizer, torch.dtype], Keeps]
    state_grows: int | None
    source: str
    at_first_step: bool = False
    known_size: bool = True
    mixed: bool = False


def _keep_nothing(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    return "nothing"


def _ask_te(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    return "master" if getattr(optimizer, "master_weights", False) else "nothing"


def _ask_apex(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    # Its step hands master weights to the fp16 kernel alone; for bf16 parameters the flag is accepted and ignored.
    if dtype is torch.float16 and getattr(optimizer, "master_weights", False):
        return "master"
    return "nothing"


def _ask_torchao(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    if dtype is torch.bfloat16 and getattr(optimizer, "bf16_stochastic_round", False):
        return "compensation"
    return "nothing"


def _ask_optimi(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    # None, the default, turns Kahan summation on for low-precision parameters.
    if any(group.get("kahan_sum") is False for group in optimizer.param_groups):
        return "nothing"
    return "compensation"


def _of_torch(name: str, state_grows: int, file: str, known_size: bool = False) -> Known:
    return Known(f"torch.optim.{name}", _keep_nothing, state_grows, f"torch/optim/{file}, torch 2.13.0", known_size=known_size)


KNOWN: Final = (
    _of_torch("Adam", 4, "adam.py", known_size=True),
    _of_torch("AdamW", 4, "adamw.py", known_size=True),  # an Adam since torch 2.7
    _of_torch("Adamax", 4, "adamax.py", known_size=True),  # lr * g / |g| at the first step
    # lr * g / |g| at the first step; a second update of 0.056 lr follows within it, and is rounded by itself.
    _of_torch("NAdam", 4, "nadam.py", known_size=True),
    _of_torch("RAdam", 4, "radam.py"),  # lr * g until it is rectified
    _of_torch("Adafactor", 0, "_adafactor.py"),  # relative to each tensor's norm; its states are of a row and a column
    _of_torch("Muon", 0, "_muon.py"),  # an orthogonalized matrix, whose elements differ
    _of_torch("SGD", 0, "sgd.py"),
    _of_torch("RMSprop", 2, "rmsprop.py"),
    _of_torch("Adagrad", 2, "adagrad.py"),
    _of_torch("Adadelta", 4, "adadelta.py"),
    _of_torch("ASGD", 2, "asgd.py"),
    _of_torch("Rprop", 4, "rprop.py"),
    Known(
        "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam",
        _ask_te,
        0,  # its states are fp32
        "fused_adam.py, TransformerEngine 04912bf",
        at_first_step=True,
    ),
    Known(
        "apex.optimizers.fused_adam.FusedAdam",
        _ask_apex,
        0,  # its states are fp32
        "apex/optimizers/fused_adam.py, apex 004da4e",
        at_first_step=True,
    ),
    Known("torchao.optim.adam._AdamBase", _ask_torchao, 0, "torchao/optim/adam.py, torchao 0.18.0", True, mixed=True),
    Known("optimi.optimizer.OptimiOptimizer", _ask_optimi, 4, "optimi/optimizer.py, utils.py, torch-optimi 0.3.3", mixed=True),
    Known(
        "bitsandbytes.optim.optimizer.Optimizer8bit", _keep_nothing, 0, "bitsandbytes/optim/optimizer.py, 0.50.2", mixed=True
    ),
    # The classes keep none, the engine's wrappers add it.
    Known("deepspeed.ops.adam.fused_adam.FusedAdam", _keep_nothing, 0, "deepspeed/ops/adam/fused_adam.py", True),
    Known("deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam", _keep_nothing, 0, "deepspeed/ops/adam/cpu_adam.py", True),
)
_BY_BASE: Final = {known.base: known for known in KNOWN}
_REST_OF_TORCH: Final = Known("torch.optim", _keep_nothing, None, "torch/optim/*.py, torch 2.13.0", known_size=False)


def look_up(optimizer: Optimizer) -> Known | None:
    """The entry for an optimizer or a subclass of a known one; None where nothing is known of its updates.

    Every class of ``torch.optim`` is known to keep nothing beside a bf16 parameter.
    """
    kinds = type(optimizer).__mro__
    for kind in kinds:
        known = _BY_BASE.get(_dotted(kind))
        if known is None and kind is not Optimizer and kind.__module__.startswith("torch.optim."):
            known = _REST_OF_TORCH
        if known is not None:
            is_meant = not known.mixed or any(_ADAM_LIKE.search(kind.__name__) for kind in kinds)
            return known if is_meant else None
    return None


def may_have_master_weights(optimizer: Optimizer, known: Known) -> bool:
    """Whether the policy can keep master weights for an optimizer, as far as its class and its groups tell.

    Not for ``torch.optim.LBFGS`` and ``SparseAdam``, which have no entry of their own, nor for a differentiable step.
    """
    is_differentiable = any(group.get("differentiable") for group in optimizer.param_groups)
    return _is_torchs(known) and known is not _REST_OF_TORCH and not is_differentiable


def steps_as_known(optimizer: Optimizer) -> bool:
    """Whether ``step`` is that of a known class, which writes each update into the parameter itself.

    The step of a subclass may do something else. torch wraps the step in its hooks, on whichever class is constructed first;
    the wrapper keeps the name of the module that the step was written in.
    """
    written_in = str(type(optimizer).step.__module__)
    bases = {known.base.rpartition(".")[0] for known in KNOWN}
    return written_in.startswith("torch.optim.") or written_in in bases


def state_growth(known: Known, group: dict[str, Any]) -> int | None:
    """By how many bytes per element the states of a parameter group grow from 16 to 32 bits; None where it was not counted."""
    if known.state_grows is None:
        return None
    added = sum(2 for argument in _ADDS_A_STATE if group.get(argument))
    return known.state_grows + added if _is_torchs(known) else known.state_grows


def is_engine_loaded() -> bool:
    """Whether an engine is there that may swap in fp32 copies after an optimizer's construction."""
    return any(engine in sys.modules for engine in _ENGINES)


def _is_torchs(known: Known) -> bool:
    return known.base.startswith("torch.optim")


def name(optimizer: Optimizer) -> str:
    """The class as its users know it."""
    return _dotted(type(optimizer))


def _dotted(kind: type) -> str:
    """The dotted path of a class; torch re-exports its optimizers one level up."""
    module = "torch.optim" if kind.__module__.startswith("torch.optim.") else kind.__module__
    return f"{module}.{kind.__qualname__}"
