"""A gradient that was rounded on its way confirms a dtype; one that was not tells nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import adamw, autocast_bf16, batch, network
from torch import nn

from precision_policy.job.gradients import FirstGradients, ZeroBits, computed_in, zero_bits

pytestmark = pytest.mark.once


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-6, 1e3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_zero_bits_of_known_formats(seed, scale, dtype):
    """A gradient that was rounded to a format on its way is told; of one that was not, nothing is."""
    gradient = torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)) * scale
    limits = torch.finfo(dtype)
    if dtype is torch.float16:  # numbers that the format holds with all of its bits
        gradient = gradient.sign() * gradient.abs().clamp(limits.tiny, limits.max / 2)
    rounded = gradient.to(dtype).float()
    told = computed_in([ZeroBits(*zero_bits(rounded).tolist())])
    expected = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: None}[dtype]
    few = len(rounded.flatten()[:: max(1, rounded.numel() // 2048)].abs().unique()) < 32
    assert told == (None if few else expected)


@pytest.mark.parametrize(
    "gradient", [torch.zeros(64, 64), torch.ones(64, 64), torch.randint(-9, 9, (64, 64)).float(), torch.randn(4, 4)]
)
def test_zero_bits_that_tell_nothing(gradient):
    """Zeros, small integers and tiny matrices look the same in every format."""
    assert computed_in([ZeroBits(*zero_bits(gradient).tolist())]) is None


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], None),
        ([(64, 64, 64, 32)], "bf16"),
        ([(63, 63, 63, 40)], None),
        ([(80, 80, 80, 31)], None),
        ([(1000, 990, 1000, 900)], "fp16"),  # 0.99 is not above 0.99
        ([(1000, 991, 1000, 900)], "bf16"),
        ([(1000, 400, 990, 900)], None),
        ([(1000, 0, 10, 50)] * 2 + [(1000, 1000, 1000, 50)], "bf16 at least in part"),
        ([(1000, 400, 1000, 900)], "fp16"),
        ([(1000, 0, 1, 900)], None),
        # An embedding that is shared with the head shows the sum of two gradients; another matrix tells.
        ([(1000, 770, 780, 900)], None),
        ([(1000, 770, 780, 900), (1000, 1000, 1000, 200)], "bf16"),
        ([(1000, 0, 0, 900)] * 2 + [(1000, 1000, 1000, 200)], "bf16 at least in part"),
        ([(1000, 0, 0, 900)] * 2 + [(1000, 100, 1000, 200)], "fp16 at least in part"),
        ([(1000, 0, 0, 900), (1000, 400, 1000, 900)], "fp16"),
    ],
)
def test_what_matrices_tell_together(rows, told):
    assert computed_in([ZeroBits(*row) for row in rows]) == told


def test_zero_bits_are_counted_exactly():
    smallest = torch.tensor(1, dtype=torch.int32).view(torch.float32).item()
    gradient = torch.tensor([0.0, 1.0, -1.0, 1.0 + 2.0**-8, 1.0 + 2.0**-10, 1.0 + 2.0**-23, smallest, -0.0, 1.5])
    assert ZeroBits(*zero_bits(gradient).tolist()) == ZeroBits(7, 3, 5, 7)


def first_gradients(dtype, penalty=0.0):
    model = network()
    gradients = FirstGradients(adamw(model))
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(batch()).float().square().mean()
    loss = loss + penalty * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    return model, gradients


@pytest.mark.parametrize(("dtype", "told"), [(None, None), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_real_gradients(dtype, told):
    """Read once, and no hook is left."""
    model, gradients = first_gradients(dtype)
    assert gradients.read() == told
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_penalty_on_the_weights_is_not_taken_for_fp32():
    """Its gradient is added in fp32 to one that was computed in bf16, so nothing is known."""
    assert first_gradients(torch.bfloat16, penalty=1e-3)[1].read() is None


def test_hooks_that_did_not_fire_are_removed():
    model = network()
    gradients = FirstGradients(adamw(model))
    assert any(p._backward_hooks for p in model.parameters())
    gradients.close()
    assert not any(p._backward_hooks for p in model.parameters())


def test_the_second_gradient_is_not_looked_at():
    """It would cost each backward pass; and what counts is what the first step was made of."""
    model = network()
    gradients = FirstGradients(adamw(model))
    with autocast_bf16():
        loss = model(batch()).float().square().mean()
    loss.backward()
    model(batch()).square().mean().backward()
    assert gradients.read() == "bf16"


def test_what_has_no_gradient_of_its_own_is_not_looked_at():
    """bf16 weights, vectors, frozen ones, and those that a lazy module has not made yet."""
    lazy = nn.LazyLinear(64).weight
    params = [lazy, nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)), nn.Parameter(torch.ones(64))]
    params.append(nn.Parameter(torch.ones(64, 64), requires_grad=False))
    gradients = FirstGradients(torch.optim.SGD(params, lr=0.1))
    assert not any(p._backward_hooks for p in params)
    assert gradients.read() is None


def test_a_sparse_gradient_tells_nothing_and_ends_nothing():
    table = nn.Embedding(100, 64, sparse=True)
    gradients = FirstGradients(torch.optim.SGD(table.parameters(), lr=0.1))
    table(torch.arange(50)).sum().backward()
    assert table.weight.grad.is_sparse
    assert gradients.read() is None


def test_of_many_matrices_eight_are_looked_at():
    params = [nn.Parameter(torch.randn(8, 8)) for _ in range(500)]
    FirstGradients(torch.optim.SGD(params, lr=0.1))
    assert 1 <= sum(bool(p._backward_hooks) for p in params) <= 8
