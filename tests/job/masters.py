"""What the tests of master weights share: parameters, and fp32 copies of them that are kept by hand."""

import pytest
import torch
from torch import nn

from precision_policy.job.events import Events
from precision_policy.job.master_weights import MasterWeights
from precision_policy.job.speaker import Speaker

bf16, int16, int32 = torch.bfloat16, torch.int16, torch.int32
LOW_BITS = "master_low_bits"


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
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        copied.grad = torch.empty_like(copied).copy_(param.grad)


def rounded(copied):
    """Ties away from zero, on the bits."""
    bits = copied.detach().contiguous().view(int32)
    return ((bits + 0x8000) >> 16).to(int16)


def assert_same(params, copies):
    for param, copied in zip(params, copies, strict=True):
        assert torch.equal(param.detach().contiguous().view(int16), rounded(copied))
