"""The kernels: on a GPU, and in Triton's interpreter, which wants a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT

pytestmark = pytest.mark.once

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs_here = pytest.mark.skipif(not (IN_INTERPRETER or DEVICE.type == "cuda"), reason="needs a GPU or Triton's interpreter")
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.process
@pytest.mark.skipif(IN_INTERPRETER, reason="it starts this file in the interpreter")
@pytest.mark.newest
def test_in_the_interpreter():
    """Triton reads its switch when it is imported, so the tests below and those of the step run in another process."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).name, "test_whole_adam.py"]
    finished = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=ENVIRONMENT | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    assert re.search(r"\d{2} passed, 5 skipped", finished.stdout), finished.stdout


@pytest.fixture
def kernels():
    return pytest.importorskip("precision_policy.job.kernels")


def all_bits():
    """Each of the 2**16 high halves with low halves on both sides of each border."""
    high = torch.arange(2**16, dtype=torch.int64) << 16
    low = torch.tensor([0, 0x7FFF, 0x8000, 0xFFFF])
    bits = (high[:, None] + low).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).to(DEVICE)


@runs_here
def test_it_can_run_here(kernels):
    """On a device with Triton, a kernel is tried and found to work."""
    assert kernels.can_run(DEVICE)


@runs_here
def test_split_and_join_are_exact(kernels):
    """An fp32 number that fits comes back bit for bit; a NaN comes back as one."""
    bits = all_bits()
    weight = bits.view(torch.float32)
    value, low, back = (
        torch.empty_like(weight, dtype=torch.bfloat16),
        torch.empty_like(weight, dtype=torch.bfloat16),
        weight.clone(),
    )
    kernels.split([weight], [value], [low])
    kernels.join([value], [low], [back])
    fits = weight.abs() < torch.finfo(torch.bfloat16).max
    assert torch.equal(back.view(torch.int32)[fits], bits[fits])
    assert torch.equal(value.isnan(), weight.isnan())
    assert torch.equal(back.isnan(), weight.isnan())
    assert torch.equal(value.isinf(), weight.double().abs() >= 255.5 * 2.0**120)  # half a step above the largest


@runs_here
def test_rounding_is_to_nearest(kernels):
    """A value is torch's own rounding, but where a tie lies in the middle."""
    bits = all_bits()
    weight = bits.view(torch.float32)
    value, low = torch.empty_like(weight, dtype=torch.bfloat16), torch.empty_like(weight, dtype=torch.bfloat16)
    kernels.split([weight], [value], [low])
    usual = ~weight.isnan() & ((bits & 0xFFFF) != 0x8000)
    assert torch.equal(value[usual], weight.bfloat16()[usual])


@runs_here
@pytest.mark.parametrize("low", [-(2**15), -1, 0, 1, 2**15 - 1])
def test_stale_low_bits(kernels, low):
    """Whatever low bits stand beside a value, it stands for a number within half a step of it, and for none if it is none."""
    value = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(torch.bfloat16)
    lows = torch.full_like(value.view(torch.int16), low).view(torch.bfloat16)
    weight = torch.empty_like(value, dtype=torch.float32)
    kernels.join([value], [lows], [weight])
    assert torch.equal(weight.isnan(), value.isnan())
    assert torch.equal(weight.isinf(), value.isinf())
    finite = value.isfinite() & (value.abs() < torch.finfo(torch.bfloat16).max)
    upper = (value.view(torch.int16)[finite] + 1).view(torch.bfloat16).float()
    half_step = (upper - value[finite].float()).abs() / 2
    assert bool(((weight[finite] - value[finite].float()).abs() <= half_step).all())


@runs_here
@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_is_torchs(kernels, decoupled, offset, implementation):
    """From the same weights and states, a step is within 2 fp32 steps of torch's on fp32 copies."""
    if "fused" in implementation and DEVICE.type == "cpu":
        pytest.skip("the arithmetic is that of torch's fused kernel for CUDA, and the one for CPUs is another")
    torch.manual_seed(0)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    shapes = [(7, 3), (5000,), (1,), (0,), (1024,)]
    values = [torch.randn(torch.Size(s).numel() + offset, device=DEVICE).bfloat16()[offset:].view(s) for s in shapes]
    lows = [torch.zeros_like(value) for value in values]
    copies = [torch.nn.Parameter(value.float()) for value in values]
    rates = {key: HYPER[key] for key in ("lr", "eps", "weight_decay")}
    optimizer = kind(copies, betas=(HYPER["beta1"], HYPER["beta2"]), **rates, **implementation)
    for count in (1, 2, 3):
        gradients = [torch.randn_like(value) for value in values]
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient.float()
        states = [optimizer.state[copy] for copy in copies]
        exp_avgs = [
            state["exp_avg"].clone() if state else torch.zeros_like(copy) for state, copy in zip(states, copies, strict=True)
        ]
        exp_avg_sqs = [
            state["exp_avg_sq"].clone() if state else torch.zeros_like(c) for state, c in zip(states, copies, strict=True)
        ]
        kernels.split([copy.detach() for copy in copies], values, lows)
        before = [copy.detach().clone() for copy in copies]
        optimizer.step()
        is_fused = "fused" in implementation
        kernels.adam(values, lows, gradients, exp_avgs, exp_avg_sqs, count=count, **HYPER, decoupled=decoupled, fused=is_fused)
        weights = [torch.empty_like(copy) for copy in copies]
        kernels.join(values, lows, weights)
        for weight, copy, old in zip(weights, copies, before, strict=True):
            # Where an update nearly cancels a weight, what is left inherits the rounding of both.
            size = torch.maximum(old.abs(), copy.detach().abs()) + (copy.detach() - old).abs()
            step = torch.exp2(torch.floor(torch.log2(size)) - 23)
            assert bool(((weight - copy).abs() <= 2 * step).all())


@runs_here
@pytest.mark.parametrize("count", [1, 1000])
def test_the_number_of_a_step(kernels, count):
    """The bias of the states is corrected by it."""
    value, low = torch.ones(4, dtype=torch.bfloat16, device=DEVICE), torch.zeros(4, dtype=torch.bfloat16, device=DEVICE)
    exp_avg, exp_avg_sq = torch.full((4,), 0.1, device=DEVICE), torch.full((4,), 0.1, device=DEVICE)
    columns = [[value], [low], [torch.ones_like(value)], [exp_avg], [exp_avg_sq]]
    kernels.adam(*columns, count=count, **HYPER, decoupled=True, fused=True)
    weight = torch.empty(4, device=DEVICE)
    kernels.join([value], [low], [weight])
    m, v = 0.9 * 0.1 + 0.1, 0.999 * 0.1 + 0.001
    update = (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)) ** 0.5 + 1e-8)
    torch.testing.assert_close(weight, torch.full_like(weight, 1 - 1e-4 - 1e-3 * update))
