"""Master weights: any optimizer of torch.optim updates bf16 parameters as if fp32 copies of them had been kept by hand."""

import copy
import importlib

import masters
import pytest
import torch
from masters import OPTIMIZERS, assert_same, by_hand, fp32_copies, give_gradients, parameters
from torch import nn

from precision_policy import fp32_weights
from precision_policy.job import pieces

bf16, int16, int32 = torch.bfloat16, torch.int16, torch.int32
serving = masters.serving


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_class_updates_as_over_copies_kept_by_hand(serving, name):
    """Bit for bit, over steps far below half a bf16 step of most weights; the model stays bf16."""
    params = parameters()
    if name == "Muon":
        params = [param for param in params if param.dim() == 2]
    if name == "Adafactor":  # torch's own divides by the size of a tensor
        params = [param for param in params if param.numel()]
    copies = fp32_copies(params)
    before = copy.deepcopy(params)
    optimizer, reference = OPTIMIZERS[name](params), OPTIMIZERS[name](copies)
    for seed in range(8):
        give_gradients(params, copies, seed)
        optimizer.step()
        by_hand(serving, reference)
        assert_same(params, copies)
    assert any(not torch.equal(old, new) for old, new in zip(before, params, strict=True))
    assert all(param.dtype is bf16 for param in params)
    kept = serving.kept(optimizer)
    assert kept.tensors == len(params)
    assert kept.elements == sum(param.numel() for param in params)
    assert not kept.refused


@pytest.mark.parametrize("name", ["AdamW", "SGD with momentum", "NAdam"])
def test_low_bits_that_look_like_nan_survive_copies_on_cuda(serving, monkeypatch, name):
    """There a foreach copy of bf16 goes through fp32, which makes all NaN alike. A mock stands in for it: no GPU is here."""
    copies_made = torch._foreach_copy_

    def as_on_cuda(targets, sources, *arguments):
        sources = [source.float().to(source.dtype) if source.dtype is bf16 else source for source in sources]
        return copies_made(targets, sources, *arguments)

    monkeypatch.setattr(torch, "_foreach_copy_", as_on_cuda)
    dtype = pieces._dtype_of_low_bits(torch.device("cuda"))
    monkeypatch.setattr(pieces, "_dtype_of_low_bits", lambda device: dtype)
    params = [nn.Parameter(torch.randn(900, generator=torch.Generator().manual_seed(seed)).to(bf16)) for seed in range(3)]
    copies = fp32_copies(params)
    optimizer, reference = OPTIMIZERS[name](params), OPTIMIZERS[name](copies)
    found = 0
    for seed in range(4):
        give_gradients(params, copies, seed)
        optimizer.step()
        by_hand(serving, reference)
        for param, copied in zip(params, copies, strict=True):
            low = optimizer.state[param][masters.LOW_BITS]
            assert torch.equal(low.view(int16), copied.detach().view(int32).to(int16))
            found += int(low.isnan().sum())
    assert found > 10


@pytest.mark.parametrize("room", [2**20, 64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_small_parameters_are_stepped_as_one_tensor(serving, monkeypatch, momentum, room):
    """It is quicker, and the same: also where momentum is switched on later, and where a parameter stands in a group twice."""
    monkeypatch.setattr("precision_policy.job.pieces._MOST_ON_CPU", room)
    seen = []
    module = importlib.import_module("torch.optim.sgd")
    step_of_torch = module.sgd

    def spying(params, *arguments, **settings):
        seen.append(len(params))
        return step_of_torch(params, *arguments, **settings)

    params = [
        nn.Parameter(torch.randn(size % 5, 3, generator=torch.Generator().manual_seed(size)).to(bf16)) for size in range(40)
    ]
    params[7] = nn.Parameter(params[7].detach().t())
    copies = fp32_copies(params)

    def make(its):
        groups = [{"params": its[:30]}, {"params": its[30:], "lr": 1e-5, "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=1e-4, momentum=momentum)

    optimizer, reference = make(params), make(copies)

    def step(seed):
        """Step both, and tell how many tensors torch's step has seen."""
        give_gradients(params, copies, seed)
        with monkeypatch.context() as patch:
            patch.setattr(module, "sgd", spying)
            seen.clear()
            optimizer.step()
        by_hand(serving, reference)
        weights = fp32_weights(optimizer)
        for param, copied in zip(params, copies, strict=True):
            assert torch.equal(weights[param], copied)
            kept = optimizer.state[param].get("momentum_buffer")
            assert kept is None or torch.equal(kept, reference.state[copied]["momentum_buffer"])
        return sum(seen)

    assert step(0) == 40  # states are made
    as_one = step(1)
    assert as_one < (3 if room > 64 else 15)  # for each piece, a tensor for each of its groups
    for owner in (optimizer, reference):
        for group in owner.param_groups:
            group["momentum"] = 0.5
    assert step(2) == (as_one if momentum else 40)
    assert step(3) == as_one
    for owner in (optimizer, reference):
        owner.param_groups[1]["params"].append(owner.param_groups[1]["params"][-1])
    assert step(4) > as_one


def test_a_fused_step_on_a_cpu_has_its_tensors_as_they_are(serving):
    """It rounds the last elements of a tensor in another way, so that many as one would not be the same bit for bit."""
    params = [nn.Parameter(torch.randn(37, generator=torch.Generator().manual_seed(seed)).to(bf16)) for seed in range(20)]
    copies = fp32_copies(params)

    def make(its):
        return torch.optim.SGD(its, lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True)

    optimizer, reference = make(params), make(copies)
    for seed in range(5):
        give_gradients(params, copies, seed)
        optimizer.step()
        by_hand(serving, reference)
    weights = fp32_weights(optimizer)
    for param, copied in zip(params, copies, strict=True):
        assert torch.equal(weights[param], copied)
        assert torch.equal(optimizer.state[param]["momentum_buffer"], reference.state[copied]["momentum_buffer"])


def snapshot(params, optimizer):
    """All that a step may change, of each parameter: weight, low bits and states."""
    found = []
    for param in params:
        entry = {name: copy.deepcopy(value) for name, value in optimizer.state.get(param, {}).items()}
        found.append((param.detach().clone(), entry))
    return found


def is_same(one, other):
    """Bit for bit."""
    (weight, entry), (other_weight, other_entry) = one, other
    if not torch.equal(weight.view(int16), other_weight.view(int16)) or entry.keys() != other_entry.keys():
        return False
    for name, value in entry.items():
        if torch.is_tensor(value):
            bits = int16 if value.dtype is bf16 else int32
            if not torch.equal(value.contiguous().view(bits), other_entry[name].contiguous().view(bits)):
                return False
        elif value != other_entry[name]:
            return False
    return True


class RaisesAt(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises at one operation of torch, as an allocation may."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("no memory left")
        return function(*args, **(kwargs or {}))


class WithAnchor(torch.optim.AdamW):
    """A class of an application's own that replaces what torch's step calls, and counts how often it is called."""

    calls = 0

    def _init_group(self, group, *args):
        self.calls += 1
        group["seen"] = self.calls
        result = super()._init_group(group, *args)
        for param in group["params"]:
            self.state[param]["anchor"] = torch.ones(1, dtype=bf16)
        return result


ATOMIC = {
    **{name: OPTIMIZERS[name] for name in ("AdamW", "AdamW fused", "SGD", "SGD with momentum", "NAdam")},
    **{name: make for name, make in OPTIMIZERS.items() if name == "Adafactor"},  # torch 2.5 and later have it
    "a class of the application's own": lambda params: WithAnchor(params, lr=1e-2),
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", ATOMIC)
def test_an_exception_leaves_each_parameter_with_the_whole_step_or_none(serving, monkeypatch, name, steps_before):
    """Raised at every operation of torch in turn; groups and state are keyed as before; the next step goes on."""
    monkeypatch.setattr("precision_policy.job.pieces._MOST_ON_CPU", 64)

    def prepared():
        params = [nn.Parameter(torch.linspace(-2, 3, size).to(bf16)) for size in (20, 7, 130)]
        optimizer = ATOMIC[name]([{"params": params[:1]}, {"params": params[1:]}])
        for seed in range(steps_before + 1):
            for param in params:
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(bf16)
            if seed < steps_before:
                optimizer.step()
        return params, optimizer

    params, optimizer = prepared()
    optimizer.step()
    whole = snapshot(params, optimizer)
    number, outcomes = 0, set()
    while True:
        number += 1
        params, optimizer = prepared()
        before = snapshot(params, optimizer)
        keys, lists, gradients = (
            list(optimizer.state),
            [group["params"] for group in optimizer.param_groups],
            [p.grad for p in params],
        )
        groups, state = optimizer.param_groups, optimizer.state
        mode = RaisesAt(number)
        try:
            with mode:
                optimizer.step()
        except torch.OutOfMemoryError:
            pass
        else:
            assert mode.left > 0
            break
        after = snapshot(params, optimizer)
        outcome = tuple(
            "none" if is_same(now, old) else "whole" if is_same(now, new) else "part"
            for now, old, new in zip(after, before, whole, strict=True)
        )
        assert "part" not in outcome, (number, outcome)
        outcomes.add(outcome)
        assert optimizer.param_groups is groups
        assert optimizer.state is state
        assert all(group["params"] is its for group, its in zip(groups, lists, strict=True))
        assert [id(key) for key in optimizer.state][: len(keys)] == [id(key) for key in keys]
        assert all(any(key is param for param in params) for key in optimizer.state)
        assert all(param.grad is gradient for param, gradient in zip(params, gradients, strict=True))
        optimizer.step()
    assert number > 20
    assert ("none",) * 3 in outcomes
