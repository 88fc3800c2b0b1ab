"""Small networks, their training, and a job that watches what they are computed in."""

import contextlib

import torch
from torch import nn

from precision_policy.job.compute import Compute
from precision_policy.job.events import Events
from precision_policy.job.speaker import Speaker
from precision_policy.record import Decision, Record

SET = Decision("set", "model.dtype", None, "float32", "", fp32=True, loads_checkpoint_dtype=True)


def record(compute_dtype=None, decisions=(SET,)):
    """What a job acts on."""
    return Record(True, False, compute_dtype, "warn", None, 0, tuple(decisions))


ON = record()
MIXED = record("bfloat16")


@contextlib.contextmanager
def watching(one=MIXED, option="precision_policy=mixed", others=()):
    """A job; the value is its :class:`Compute`."""
    speaker = Speaker()
    compute = Compute(one, speaker, option)
    events = Events([*others, compute], speaker, option)
    events.start()
    try:
        yield compute
    finally:
        events.end()


class Network(nn.Sequential):
    """torch.compile leaves a module of torch's own, called by itself, as it is."""

    def forward(self, x):
        return super().forward(x)


def network(seed=0):
    torch.manual_seed(seed)
    return Network(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))


def batch(seed=1):
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))


def adamw(*models):
    return torch.optim.AdamW([p for model in models for p in model.parameters()], lr=1e-3)


def train(model, optimizer, steps=3, call=None):
    losses = []
    for number in range(steps):
        loss = (call or model)(batch(number)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def autocast_bf16(enabled=True, cache_enabled=None):
    """The application's own, on a CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled, cache_enabled=cache_enabled)


def under_own_autocast(model, cache_enabled=None):
    """A call of the model as an application writes it that autocasts by itself."""

    def call(x):
        with autocast_bf16(cache_enabled=cache_enabled):
            return model(x)

    return call


def is_in_fp32(output):
    """Whether an output was computed in fp32: rounding it to bf16 changes it."""
    return not torch.equal(output, output.bfloat16().float())


def of_number(number, make):
    """An object with the number that another one left."""
    made = []
    while not made or id(made[-1]) != number:
        made.append(make())
        assert len(made) < 10_000
    return made[-1]
