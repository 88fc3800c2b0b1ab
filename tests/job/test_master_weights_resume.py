"""Whole over a restart: a run that is stopped and resumed equals the uninterrupted one, bit for bit."""

import io

import masters
import pytest
import torch
import torch.distributed.checkpoint as dcp
from masters import LOW_BITS, OPTIMIZERS
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

bf16, int16 = torch.bfloat16, torch.int16
serving = masters.serving


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 3, bias=False)).to(bf16)


def train(model, optimizer, steps, before_step=None):
    for seed in steps:
        generator = torch.Generator().manual_seed(seed)
        model(torch.randn(5, 2, 4, 4, generator=generator).to(bf16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(whole):
    file = io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make(name, model):
    params = [param for param in model.parameters() if param.dim() == 2] if name == "Muon" else list(model.parameters())
    return OPTIMIZERS[name](params)


def assert_equal_runs(one, two):
    (model, optimizer), (other_model, other) = one, two
    for param, twin in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(param.view(int16), twin.view(int16))
        entry, other_entry = optimizer.state.get(param, {}), other.state.get(twin, {})
        assert entry.keys() == other_entry.keys()
        for name, value in entry.items():
            assert value.dtype is other_entry[name].dtype, name
            assert torch.equal(as_bits(value), as_bits(other_entry[name])), name


def as_bits(value):
    return value.view(int16) if value.dtype is bf16 else value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop(serving, name):
    """``torch.save`` and ``load_state_dict``, of every class."""
    model = network()
    optimizer = make(name, model)
    train(model, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(3, 6))
    resumed = network(seed=1)
    other = make(name, resumed)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(3, 6))
    assert_equal_runs((model, optimizer), (resumed, other))


def test_a_checkpoint_that_was_made_without_master_weights(serving):
    """Its bf16 states become fp32, once."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    serving.events.on = False
    train(model, optimizer, range(2))
    serving.events.on = True
    state = optimizer.state_dict()["state"]
    assert {state[0][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {bf16}
    resumed = network(seed=1)
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for param, twin in zip(model.parameters(), resumed.parameters(), strict=True):
        moment = other.state[twin]["exp_avg"]
        assert moment.dtype is torch.float32
        assert torch.equal(moment, optimizer.state[param]["exp_avg"].float())
    # The one that goes on in memory is cast at its next step, to the same end.
    train(resumed, other, range(2, 4))
    train(model, optimizer, range(2, 4))
    assert_equal_runs((model, optimizer), (resumed, other))


def test_a_checkpoint_with_master_weights_loads_in_a_run_without(serving):
    """torch casts the states and does not mind the low bits."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(model, optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    serving.events.end()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    plain.load_state_dict(saved)
    before = [param.detach().clone() for param in model.parameters()]
    train(model, plain, range(2, 4))
    assert {entry["exp_avg"].dtype for entry in plain.state.values()} == {bf16}
    assert any(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_another_implementation_goes_on(serving):
    """The state has torch's own keys: from foreach to fused, as over copies kept by hand."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    train(model, optimizer, range(2))
    entry = optimizer.state[next(iter(model.parameters()))]
    assert set(entry) == {"step", "exp_avg", "exp_avg_sq", LOW_BITS}
    other = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    state = optimizer.state_dict()
    state["param_groups"][0].update(fused=True, foreach=False)
    other.load_state_dict(state)
    train(model, other, range(2, 4))
    assert other.state[next(iter(model.parameters()))]["step"] == 4


def test_an_entry_of_the_application_s_own_is_cast_as_torch_does(serving):
    """What torch's class did not make is not ours."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, range(1))
    first = next(iter(model.parameters()))
    optimizer.state[first]["anchor"] = torch.ones(2)
    other = torch.optim.AdamW(model.parameters(), lr=1e-3)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state[first]["anchor"].dtype is bf16
    assert other.state[first]["exp_avg"].dtype is torch.float32


def test_loading_leaves_torch_as_it_was(serving):
    """What torch calls for each state is its own again, also where loading raises; other optimizers are not touched."""
    process = torch.optim.Optimizer.__dict__["_process_value_according_to_param_policy"]
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert torch.optim.Optimizer.__dict__["_process_value_according_to_param_policy"] is process


def test_low_bits_of_another_shape_are_dropped(serving):
    """So a state that belongs to something else does not stop the run."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(model, optimizer, range(1))
    first = next(iter(model.parameters()))
    optimizer.state[first][LOW_BITS] = torch.zeros(3, dtype=bf16)
    train(model, optimizer, range(1, 2))
    assert optimizer.state[first][LOW_BITS].shape == first.shape


def test_whole_masters_of_fsdp_become_low_bits(serving):
    """A state that holds ``master_param``, as FSDP1 with ``use_orig_params`` keeps it, goes on anywhere."""
    model, twin = network(), network()
    optimizer, other = (torch.optim.AdamW(one.parameters(), lr=1e-4) for one in (model, twin))
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    for param in twin.parameters():
        low = other.state[param].pop(LOW_BITS)
        bits = (param.detach().view(int16).int() << 16) + low.view(int16)
        other.state[param]["master_param"] = bits.view(torch.float32)
    train(model, optimizer, range(3, 5))
    train(twin, other, range(3, 5))
    assert_equal_runs((model, optimizer), (twin, other))


def test_distributed_checkpoint_in_one_process(serving, tmp_path):
    """It makes its template by a step of its own, with an lr of 0, before anything is loaded."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, range(3))
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    train(model, optimizer, range(3, 6))
    resumed = network(seed=1)
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    template = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(template, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed, other, template["optimizer"])
    resumed.load_state_dict(template["model"])
    train(resumed, other, range(3, 6))
    assert_equal_runs((model, optimizer), (resumed, other))


def test_distributed_checkpoint_without_low_bits(serving, tmp_path):
    """DCP wants each key of its template in the checkpoint, unless it is told that some may be missing."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    serving.events.on = False
    train(model, optimizer, range(2))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    serving.events.on = True
    resumed = network(seed=1)
    resumed.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    template = {"optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(template, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(resumed, other, template["optimizer"])
    train(model, optimizer, range(2, 4))
    train(resumed, other, range(2, 4))
    assert_equal_runs((model, optimizer), (resumed, other))
