"""What a ``_target_`` or an optimizer's name stands for, judged by its text alone: nothing is imported here.

The names are those of ``torch.optim`` as of torch 2.13; its modules ``lr_scheduler`` and ``swa_utils`` hold no
optimizers, and ``torch.optim.Optimizer`` is only their base class.
"""

from __future__ import annotations

import re
from typing import Any

TORCH_ADAM_TARGETS = frozenset({"torch.optim.Adam", "torch.optim.AdamW", "torch.optim.adam.Adam", "torch.optim.adamw.AdamW"})

# By pattern and not by list, so that an optimizer of a newer torch counts: each of them keeps no master copy.
_TORCH_OPTIM = re.compile(r"torch\.optim\.(?:(?!lr_scheduler\b|swa_utils\b)\w+\.)*(?!Optimizer$)[A-Z]\w*")

# Adafactor and Muon are left out: by name alone they are as likely to be another package's.
_BY_NAME = {
    name.lower(): f"torch.optim.{name}"
    for name in [
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "LBFGS",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "SparseAdam",
    ]
}
# The names of transformers.TrainingArguments(optim=...) that stand for torch.optim.AdamW.
_BY_NAME |= dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "torch.optim.AdamW")


def dotted(target: Any) -> str | None:
    """The dotted path of a target given as a string or as the class or function itself; None for anything else."""
    if isinstance(target, str):
        return target or None
    name = getattr(target, "__qualname__", None)
    return f"{target.__module__}.{name}" if isinstance(name, str) else None


def is_torch_optim(target: object) -> bool:
    """Whether a dotted path names an optimizer that ships in ``torch.optim``."""
    return isinstance(target, str) and _TORCH_OPTIM.fullmatch(target) is not None


def guess(name: str) -> str | None:
    """The ``torch.optim`` class that a bare name such as ``adamw`` most likely stands for, or None."""
    return name if is_torch_optim(name) else _BY_NAME.get(name.strip().lower())


def is_factory(target: str) -> bool:
    """Whether a dotted path names one of the usual factories of models, which take a dtype: transformers' and diffusers'."""
    return target.rpartition(".")[2] in ("from_pretrained", "from_config")
