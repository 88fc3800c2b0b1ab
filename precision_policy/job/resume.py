"""The states of served optimizers on their way: out of a checkpoint, and back to torch at the end of a job."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from precision_policy.job.pieces import LOW_BITS, WHOLE
from precision_policy.job.torch_states import Kind, kind_of
from precision_policy.job.wrapping import wrap

# torch has one method for all optimizers, so while it is another one, nobody else may load.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def states_as_they_are(optimizer: Optimizer) -> Iterator[None]:
    """Let ``load_state_dict`` keep fp32 over bf16 parameters, where torch casts each state to the parameter's dtype.

    A checkpoint that was made without master weights has bf16 states: they become fp32.
    """
    kind = kind_of(type(optimizer))
    name = "_process_value_according_to_param_policy"
    with _one_at_a_time:
        original = Optimizer.__dict__.get(name)
        if original is None:  # a torch that has moved it rounds them
            yield
            return

        def process(param: torch.Tensor, value: torch.Tensor, param_id: Any, groups: Any, key: Any = None) -> torch.Tensor:
            if param.dtype is torch.bfloat16:
                if key in (LOW_BITS, WHOLE):
                    return value.to(device=param.device)
                if kind.makes(key, value):
                    dtype = torch.float32 if value.dtype is torch.bfloat16 else value.dtype
                    return value.to(device=param.device, dtype=dtype)
            processed: torch.Tensor = original.__func__(param, value, param_id, groups, key)
            return processed

        setattr(Optimizer, name, staticmethod(process))
        try:
            yield
        finally:
            setattr(Optimizer, name, original)


def to_param_dtype(optimizer: Optimizer, kind: Kind, param: torch.Tensor) -> None:
    """Cast the states of a parameter to its dtype, and drop the low bits: what torch's own step needs."""
    entry = optimizer.state.get(param)
    if not entry:
        return
    entry.pop(LOW_BITS, None)
    entry.pop(WHOLE, None)
    for name, value in entry.items():
        if kind.makes(name, value) and name not in kind.numbers:
            entry[name] = value.to(param.dtype)


def hand_back(optimizer: Optimizer) -> None:
    """Cast the states of all bf16 parameters of an optimizer to bf16, and drop their low bits."""
    kind = kind_of(type(optimizer))
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.dtype is torch.bfloat16:
                to_param_dtype(optimizer, kind, param)


def let_low_bits_be_missing() -> Callable[[], None] | None:
    """Let a distributed checkpoint load that was made without master weights, where its planner demands every key of a state.

    ``torch.distributed.checkpoint`` asks the checkpoint for what the states of this run have, after a step with a learning rate
    of zero. So the low bits are asked for, which only a checkpoint with master weights has.

    Returns:
        What undoes it; None where the job has not imported that package.
    """
    planner: Any = sys.modules.get("torch.distributed.checkpoint.default_planner")
    if planner is None:
        return None

    def plan(make_plan: Callable[..., Any], state_dict: dict[str, Any], metadata: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = {}
        for name, value in state_dict.items():
            if name in metadata.state_dict_metadata or not name.endswith((f".{LOW_BITS}", f".{WHOLE}")):
                wanted[name] = value
        return make_plan(wanted, metadata, *args, **kwargs)

    return wrap(planner, "create_default_local_load_plan", plan)
