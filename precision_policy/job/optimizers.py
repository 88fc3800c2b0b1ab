"""What known optimizers keep beside the parameter: by what they do and not by where they live.

Each entry was read in the source that it names. An optimizer that is not here is not judged: nothing is known of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Literal

import torch
from torch.optim import Optimizer

Keeps = Literal["nothing", "master", "compensation"]

# Families that hold optimizers of every kind are judged only where the class's own name says that it is one of these: the
# update of SGD, say, is of the size of its gradient, and nothing is known of what it loses.
_ADAM_LIKE = re.compile(r"Adam|AdEMAMix|Adan|Lion", re.IGNORECASE)

_ENGINES = ("deepspeed", "megatron")


@dataclass(frozen=True)
class Known:
    """An optimizer family.

    Attributes:
        base: dotted path of the class that all of the family derive from; torch's own one level up, as users write it.
        keeps: what one of them keeps over parameters of a 16-bit dtype, told from the instance under construction.
        state_grows: by how many bytes per element its state grows when storage goes from 16 to 32 bits.
        source: where this was read, with the version.
        engine_owned: whether an engine usually swaps in fp32 copies after construction, so that only the first step tells.
        known_size: whether the first update is lr for every element, so that the share it loses can be told.
        mixed: whether the family also holds optimizers that are not like Adam.
    """

    base: str
    keeps: Callable[[Optimizer, torch.dtype], Keeps]
    state_grows: int
    source: str
    engine_owned: bool = False
    known_size: bool = True
    mixed: bool = False


def _nothing(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    return "nothing"


def _te(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    return "master" if _argument(optimizer, "master_weights") else "nothing"


def _apex(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    # Its step hands master weights to the fp16 kernel alone; for bf16 parameters the flag is accepted and ignored.
    return "master" if dtype is torch.float16 and _argument(optimizer, "master_weights") else "nothing"


def _torchao(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    rounds = dtype is torch.bfloat16 and _argument(optimizer, "bf16_stochastic_round")
    return "compensation" if rounds else "nothing"


def _optimi(optimizer: Optimizer, dtype: torch.dtype) -> Keeps:
    # None, the default, turns Kahan summation on for low-precision parameters.
    return "nothing" if any(group.get("kahan_sum") is False for group in optimizer.param_groups) else "compensation"


KNOWN: Final = (
    Known("torch.optim.Adam", _nothing, 4, "torch/optim/adam.py, torch 2.13.0"),
    Known("torch.optim.AdamW", _nothing, 4, "torch/optim/adamw.py, torch 2.13.0"),  # an Adam since torch 2.7
    Known("torch.optim.Adamax", _nothing, 4, "torch/optim/adamax.py, torch 2.13.0: lr * g / |g| at the first step"),
    # A second update of 0.056 lr follows the first of lr, and is rounded by itself.
    Known("torch.optim.NAdam", _nothing, 4, "torch/optim/nadam.py, torch 2.13.0: lr * g / |g| at the first step"),
    # lr * g until it is rectified.
    Known("torch.optim.RAdam", _nothing, 4, "torch/optim/radam.py, torch 2.13.0", known_size=False),
    # Relative to each tensor's norm; its states are of a row and a column.
    Known("torch.optim.Adafactor", _nothing, 0, "torch/optim/_adafactor.py, torch 2.13.0", known_size=False),
    # An orthogonalized matrix, whose elements differ.
    Known("torch.optim.Muon", _nothing, 2, "torch/optim/_muon.py, torch 2.13.0", known_size=False),
    # Its states are fp32.
    Known("transformer_engine.pytorch.optimizers.fused_adam.FusedAdam", _te, 0, "fused_adam.py, TransformerEngine 04912bf"),
    Known("apex.optimizers.fused_adam.FusedAdam", _apex, 0, "apex/optimizers/fused_adam.py, apex 004da4e"),
    Known("torchao.optim.adam._AdamBase", _torchao, 0, "torchao/optim/adam.py, torchao 0.18.0", mixed=True),
    Known("optimi.optimizer.OptimiOptimizer", _optimi, 4, "optimi/optimizer.py, utils.py, torch-optimi 0.3.3", mixed=True),
    Known("bitsandbytes.optim.optimizer.Optimizer8bit", _nothing, 0, "bitsandbytes/optim/optimizer.py, 0.50.2", mixed=True),
    # The classes keep none, the engine's wrappers add it.
    Known("deepspeed.ops.adam.fused_adam.FusedAdam", _nothing, 0, "deepspeed/ops/adam/fused_adam.py", engine_owned=True),
    Known("deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam", _nothing, 0, "deepspeed/ops/adam/cpu_adam.py", engine_owned=True),
)
_BY_BASE: Final = {known.base: known for known in KNOWN}


def look_up(optimizer: Optimizer) -> Known | None:
    """The entry for an optimizer or a subclass of a known one; None where nothing is known of its updates."""
    mro = type(optimizer).__mro__
    for kind in mro:
        known = _BY_BASE.get(_dotted(kind))
        if known is not None:
            return known if not known.mixed or any(_ADAM_LIKE.search(one.__name__) for one in mro) else None
    return None


def engine_is_loaded() -> bool:
    """Whether an engine is there that may swap in fp32 copies after an optimizer's construction."""
    return any(engine in sys.modules for engine in _ENGINES)


def name(optimizer: Optimizer) -> str:
    """The class as its users know it."""
    return _dotted(type(optimizer))


def _dotted(kind: type) -> str:
    """The dotted path of a class; torch re-exports its optimizers one level up."""
    module = "torch.optim" if kind.__module__.startswith("torch.optim.") else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _argument(optimizer: Optimizer, name: str) -> Any:
    """A constructor's argument, also while that constructor still runs and has not stored it yet.

    Parameter groups exist as soon as torch's own constructor returns, which is in the middle of the subclass's; its
    arguments are then still in its frame alone.
    """
    if hasattr(optimizer, name):
        return getattr(optimizer, name)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is optimizer and name in frame.f_locals:
            return frame.f_locals[name]
        frame = frame.f_back
    return None
