"""Adam's and AdamW's step in one kernel, made by optimizers: on a GPU, and in Triton's interpreter (see test_kernels.py)."""

import copy

import masters
import pytest
import torch
from masters import fp32_copies, give_gradients, parameters
from test_kernels import DEVICE, runs_here
from torch import nn

from precision_policy import fp32_weights

pytestmark = [pytest.mark.once, runs_here]
serving = masters.serving

STEPS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, weight_decay=0.1),
    "AdamW, two groups": lambda groups: torch.optim.AdamW(
        [{"params": groups[:2], "lr": 1e-2, "betas": (0.8, 0.9)}, {"params": groups[2:]}], lr=1e-3, weight_decay=0.0
    ),
}


@pytest.fixture
def by_kernel(serving, monkeypatch):
    """The listener, and in ``launches`` how many elements each launch of the kernel had."""
    from precision_policy.job import kernels

    launches = []
    adam = kernels.adam

    def counted(values, *columns, **numbers):
        launches.append(sum(value.numel() for value in values))
        adam(values, *columns, **numbers)

    monkeypatch.setattr(kernels, "adam", counted)
    serving.launches = launches
    return serving


def on_device():
    """Parameters of several shapes and strides, without the one that has gaps in its memory, which no kernel steps."""
    return [nn.Parameter(param.detach().to(DEVICE)) for param in parameters()[:-1]]


def assert_close(optimizer, params, copies, steps):
    """Each step may end two fp32 steps beside torch's, of the largest number in it: a weight and its update."""
    weights = fp32_weights(optimizer)
    for param, copied in zip(params, copies, strict=True):
        size = copied.detach().abs().clamp(min=0.02)
        assert bool(((weights[param] - copied).abs() <= steps * 2 * 2**-23 * size).all())


@pytest.mark.parametrize("name", STEPS)
def test_weights_are_those_of_copies_kept_by_hand(by_kernel, name):
    """Parameters of any strides, one of which is unfrozen later, so that its steps have other numbers."""
    params = on_device()
    copies = fp32_copies(params)
    optimizer, reference = STEPS[name](params), STEPS[name](copies)
    for seed in range(6):
        give_gradients(params, copies, seed)
        if seed < 3:
            params[1].grad = copies[1].grad = None
        optimizer.step()
        masters.by_hand(by_kernel, reference)
        assert_close(optimizer, params, copies, seed + 1)
    assert sum(by_kernel.launches) == 6 * sum(param.numel() for param in params) - 3 * params[1].numel()
    assert optimizer.state[params[1]]["step"].item() == 3
    assert optimizer.state[params[0]]["step"].item() == 6
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "master_low_bits"}


def test_a_launch_is_made_as_soon_as_it_is_worth_it(by_kernel, monkeypatch):
    """Each has as many elements as all before it, or more."""
    monkeypatch.setattr("precision_policy.job.whole_adam._ENOUGH_FOR_A_LAUNCH", 10)
    params = [nn.Parameter(torch.ones(8, device=DEVICE, dtype=torch.bfloat16)) for _ in range(12)]
    for param in params:
        param.grad = torch.ones_like(param)
    torch.optim.AdamW(params).step()
    assert by_kernel.launches == [16, 16, 32, 32]


def test_a_launch_that_fails_leaves_each_parameter_with_the_whole_step_or_none(by_kernel, monkeypatch):
    """The parameters of the launches before it have made the step; the next step goes on for all."""
    monkeypatch.setattr("precision_policy.job.whole_adam._ENOUGH_FOR_A_LAUNCH", 10)
    params = [nn.Parameter(torch.ones(8, device=DEVICE, dtype=torch.bfloat16)) for _ in range(6)]
    optimizer = torch.optim.AdamW(params, lr=1e-2)

    def step():
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

    step()
    from precision_policy.job import kernels

    working, calls = kernels.adam, []

    def fails_at_the_second(*columns, **numbers):
        calls.append(columns)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        working(*columns, **numbers)

    monkeypatch.setattr(kernels, "adam", fails_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2, 1, 1, 1, 1]
    weights = fp32_weights(optimizer)
    assert bool((weights[params[0]] < weights[params[2]]).all())
    assert all(torch.equal(weights[param], weights[params[2]]) for param in params[2:])
    step()
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("way", ["loaded", "written"])
def test_the_number_of_steps_is_that_of_the_state(by_kernel, way):
    """Also where a checkpoint or the application has put another one there."""
    params = on_device()
    copies = fp32_copies(params)
    optimizer, reference = STEPS["AdamW"](params), STEPS["AdamW"](copies)
    for its in (optimizer, reference):
        give_gradients(params, copies, 0)
        its.step() if its is optimizer else masters.by_hand(by_kernel, its)
    for its, owned in ((optimizer, params), (reference, copies)):
        if way == "written":
            for param in owned:
                its.state[param]["step"].fill_(99)
        else:
            saved = copy.deepcopy(its.state_dict())
            for entry in saved["state"].values():
                entry["step"] = torch.tensor(99.0)
            its.load_state_dict(saved)
    give_gradients(params, copies, 1)
    optimizer.step()
    masters.by_hand(by_kernel, reference)
    assert_close(optimizer, params, copies, 2)
    assert optimizer.state[params[0]]["step"].item() == 100


def test_a_resumed_run_goes_on_bit_for_bit(by_kernel):
    """A copy of the parameters and of the state dict."""
    params = on_device()
    optimizer = STEPS["AdamW"](params)
    give_gradients(params, fp32_copies(params), 0)
    optimizer.step()
    others = copy.deepcopy(params)
    resumed = STEPS["AdamW"](others)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for its, owned in ((optimizer, params), (resumed, others)):
        give_gradients(owned, fp32_copies(owned), 1)
        its.step()
    weights, others_weights = fp32_weights(optimizer), fp32_weights(resumed)
    for param, other in zip(params, others, strict=True):
        assert torch.equal(weights[param], others_weights[other])
