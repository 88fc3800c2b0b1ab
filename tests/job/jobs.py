"""What the tests of the job share: records, weights, steps."""

from dataclasses import dataclass, field

import torch

from precision_policy.record import Decision, Record

CHOSEN = Decision("explicit_dtype", "model.dtype", "bfloat16", "bfloat16", "chosen", fix="model.dtype=float32")
SET = Decision("set", "model.dtype", None, "float32", "set", fp32=True)
PEFT = Decision("peft", "model.dtype", None, None, "PEFT is on", fix="model.dtype=float32")
NO_MODEL = Decision("no_model", None, None, None, "there is nothing at model")


def record(*decisions, **changes):
    """A job's record; by default of one whose bf16 was chosen, which only warns."""
    usual = {
        "enabled": True,
        "master_weights": False,
        "compute_dtype": None,
        "bf16_adam": "warn",
        "sample": None,
        "monitor_every": 0,
        "decisions": decisions or (CHOSEN,),
    }
    return Record(**usual | changes)


def weights(dtype=torch.bfloat16, count=1, requires_grad=True):
    """Ones, none of which moves at lr 1e-5."""
    return [torch.nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=requires_grad) for _ in range(count)]


def normal(*size, dtype=torch.bfloat16):
    """A parameter as models have them."""
    return torch.nn.Parameter((torch.randn(*size or (64, 64)) * 0.02).to(dtype))


def step(optimizer):
    """One step with gradients of one."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                param.grad = torch.ones_like(param)
    optimizer.step()


@dataclass(frozen=True)
class Kept:
    """What the step of an optimizer kept master weights for."""

    tensors: int
    elements: int
    added_bytes: int
    refused: dict = field(default_factory=dict)
