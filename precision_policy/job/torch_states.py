"""What each class of ``torch.optim`` keeps for a parameter, and what its step does: read in torch 2.13.0's ``torch/optim``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch.optim import Optimizer

from precision_policy.job.events import SERVED_BY_NAME


@dataclass(frozen=True)
class Kind:
    """A class that updates parameters.

    Attributes:
        states: the names of the states that it makes in the parameter's dtype; of the parameter's shape if it is elementwise.
        numbers: the names of its other states of floating point but ``step``, each a single number.
        elementwise: whether each element is updated by itself, so that a tensor may be cut anywhere.
        by_tensor: whether each tensor is updated by itself, so that tensors may be stepped one after the other.
        is_known: whether its states are known by name. If not, all of floating point are taken for torch's.
        stateless_without: the setting of a group without which it makes no state at all. With it, it makes one for a parameter,
            and counts no steps.
    """

    states: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    elementwise: bool = True
    by_tensor: bool = True
    is_known: bool = True
    stateless_without: str | None = None

    def makes(self, name: Any, value: Any) -> bool:
        """Whether an entry of a parameter's state is a floating-point one of torch's class, and not the application's own."""
        if not torch.is_tensor(value) or not value.is_floating_point() or name == "step":
            return False
        return not self.is_known or name in self.states or name in self.numbers


_ADAM: Final = Kind(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
_UNKNOWN: Final = Kind((), elementwise=False, by_tensor=False, is_known=False)
# Adafactor of transformers 5.23, optimization.py.
_NAMED_ADAFACTOR: Final = Kind(("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"), ("RMS",), elementwise=False)

KINDS: Final = {
    "SGD": Kind(("momentum_buffer",), stateless_without="momentum"),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "NAdam": Kind(("exp_avg", "exp_avg_sq"), ("mu_product",)),
    "RAdam": Kind(("exp_avg", "exp_avg_sq")),
    "Adamax": Kind(("exp_avg", "exp_inf")),
    "Adadelta": Kind(("square_avg", "acc_delta")),
    "Adagrad": Kind(("sum",)),
    "ASGD": Kind(("ax",), ("eta", "mu")),
    "RMSprop": Kind(("square_avg", "momentum_buffer", "grad_avg")),
    "Rprop": Kind(("prev", "step_size")),
    "Adafactor": Kind(("row_var", "col_var", "variance"), elementwise=False),
    "Muon": Kind(("momentum_buffer",), elementwise=False),
}

# What a class of the application's own may replace without changing what torch's step does inside.
_OUTSIDE_THE_STEP: Final = {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"}


def base_of(kind: type[Optimizer]) -> type | None:
    """The class whose step updates the parameters: the first one of ``torch.optim``, or one that is served by name."""
    for base in kind.__mro__:
        if base is Optimizer:
            return None
        name = f"{base.__module__}.{base.__qualname__}"
        if name.startswith("torch.optim.") or f"{name}.step" in SERVED_BY_NAME:
            return base
    return None


def kind_of(kind: type[Optimizer]) -> Kind:
    """What is known of the step of a class of optimizers.

    Where a class of the application's own replaces what torch's step calls, such as ``_init_group``, all parameters must be
    stepped at once.
    """
    base = base_of(kind)
    if base is None:
        return _UNKNOWN
    known = KINDS.get(base.__name__, _UNKNOWN)
    if not f"{base.__module__}.".startswith("torch.optim."):  # torch's Muon says that it is of torch.optim itself
        known = _NAMED_ADAFACTOR
    inside = set(dir(base)) | {"state", "param_groups", "defaults"}
    for derived in kind.__mro__:
        if derived is base:
            break
        replaced = {name for name in vars(derived) if not name.startswith("__")} - _OUTSIDE_THE_STEP
        if replaced & inside:
            return replace(known, elementwise=False, by_tensor=False)
    return known
