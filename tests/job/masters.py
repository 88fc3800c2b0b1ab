"""What the tests of master weights share: parameters, and fp32 copies of them that are kept by hand."""

import pytest
import torch
from torch import nn

from precision_policy.job.events import Events
from precision_policy.job.master_weights import MasterWeights
from precision_policy.job.speaker import Speaker

bf16, int16, int32 = torch.bfloat16, torch.int16, torch.int32
LOW_BITS = "master_low_bits"


OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, foreach=False),
    "Adam with weight decay, foreach": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1, foreach=True),
    "Adam fused": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
    "AdamW single": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=False),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True),
    "AdamW fused amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True, fused=True),
    "AdamW maximize": lambda params: torch.optim.AdamW(params, lr=1e-3, maximize=True),
    "AdamW with a tensor for lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-3), foreach=False),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=1e-3),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=1e-3),
    "Adadelta": lambda params: torch.optim.Adadelta(params),
    "Adagrad": lambda params: torch.optim.Adagrad(params, initial_accumulator_value=0.1),
    "Adagrad fused": lambda params: torch.optim.Adagrad(params, fused=True),
    "ASGD": lambda params: torch.optim.ASGD(params),
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "Rprop": lambda params: torch.optim.Rprop(params),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-4),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9, fused=True),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "Muon": lambda params: torch.optim.Muon([param for param in params if param.dim() == 2]),
}
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if hasattr(torch.optim, name.split()[0])}


@pytest.fixture
def serving():
    """Master weights, on for the time of a test."""
    listener = MasterWeights()
    listener.events = Events([listener], Speaker())
    listener.events.start()
    yield listener
    listener.events.end()


def by_hand(listener, optimizer, *arguments):
    """A step of torch's own."""
    listener.events.on = False
    try:
        return optimizer.step(*arguments)
    finally:
        listener.events.on = True


def parameters(seed=0):
    """bf16 parameters of several shapes and strides, one of them empty, one a scalar, one with gaps in its memory."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(bf16)

    channels_last = random(4, 3, 5, 2).to(memory_format=torch.channels_last)
    tensors = [
        random(8, 5),
        random(3),
        channels_last,
        random(0),
        random(),
        random(64, 33),
        random(7, 6).t(),
        random(6, 8)[:, ::2],
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


def fp32_copies(params):
    """Copies as a user would keep them by hand, in the same memory format."""
    return [nn.Parameter(param.detach().float()) for param in params]


def give_gradients(params, copies, seed):
    """Gradients in other strides than the parameters'; in the copies' own, since torch's fused step takes no others in truth."""
    generator = torch.Generator().manual_seed(seed)
    for param, copied in zip(params, copies, strict=True):
        param.grad = torch.randn(param.shape, generator=generator).to(param)
        copied.grad = torch.empty_like(copied).copy_(param.grad)


def rounded(copied):
    """Ties away from zero, on the bits."""
    bits = copied.detach().contiguous().view(int32)
    return ((bits + 0x8000) >> 16).to(int16)


def assert_same(params, copies):
    for param, copied in zip(params, copies, strict=True):
        assert torch.equal(param.detach().contiguous().view(int16), rounded(copied))
