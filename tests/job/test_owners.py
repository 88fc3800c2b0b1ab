"""Owners: the outermost modules that are called, found once, without a trace in torch afterwards."""

import contextlib
import gc
import threading

import pytest
import torch
from networks import adamw, batch, network, of_number
from torch import nn
from torch.nn.utils import stateless

from precision_policy.job.owners import Owners

pytestmark = pytest.mark.once
PLAIN = nn.Module.__call__, stateless._functional_call


def is_torchs_own():
    return (nn.Module.__call__, stateless._functional_call) == PLAIN


@contextlib.contextmanager
def looking(*optimizers, found=None):
    """Owners that follow optimizers; the value is the list of those that were found."""
    seen = []

    def note(module, own, in_graph):
        seen.append(module)
        if found is not None:
            found(module, own)

    owners = Owners(note, lambda look, *args: look(*args))
    for optimizer in optimizers:
        owners.follow(optimizer)
    try:
        yield seen, owners
    finally:
        owners.stop()
        assert is_torchs_own()


class Holder(nn.Module):
    """A module around others, called or not."""

    def __init__(self, *inside):
        super().__init__()
        self.inside = nn.ModuleList(inside)

    def forward(self, x):
        for one in self.inside:
            x = one(x)
        return x


def test_the_outermost_module_that_owns_is_the_one():
    inner, stranger = network(), network(1)
    outer = Holder(inner)
    with looking(adamw(inner)) as (seen, _):
        stranger(batch())
        assert seen == []
        assert not is_torchs_own()
        outer(batch())
        assert seen == [outer]
        assert is_torchs_own()
        inner(batch())
        assert seen == [outer]


def test_torchs_call_is_back_once_the_owners_were_called():
    """Also where an optimizer never steps: each call of any module would pay for it."""
    models = network(0), network(1)
    optimizer = adamw(*models)
    with looking(optimizer) as (seen, _):
        models[0](batch())
        assert not is_torchs_own()
        models[1](batch())
        assert is_torchs_own()
    assert seen == [*models]


def test_an_optimizer_that_is_dropped_is_looked_for_no_longer():
    trained, other = network(0), network(1)
    with looking() as (_, owners):
        owners.follow(adamw(trained))
        gc.collect()
        other(batch())
        assert is_torchs_own()


def test_parameters_that_were_trained_without_a_call_are_not_waited_for():
    """No call of a module that owns them will come. One that was not trained yet is waited for."""
    weights, later = nn.Parameter(torch.ones(64, 64)), network()
    optimizer = torch.optim.SGD([weights, *later.parameters()], lr=0.1)
    with looking(optimizer) as (seen, owners):
        (batch() @ weights).sum().backward()
        owners.forget(optimizer)
        assert not is_torchs_own()
        later(batch())
        assert seen == [later]
        assert is_torchs_own()


def test_only_trainable_parameters_are_looked_for():
    frozen, trained = network(0).requires_grad_(False), network(1)
    with looking(adamw(frozen, trained)) as (seen, _):
        frozen(batch())
        trained(batch())
    assert seen == [trained]


def test_parameters_that_join_before_the_first_call_are_looked_for():
    first, second = network(0), network(1)
    optimizer = adamw(first)
    with looking(optimizer) as (seen, _):
        optimizer.add_param_group({"params": list(second.parameters())})
        second(batch())
        first(batch())
    assert seen == [second, first]


def test_the_number_of_a_parameter_that_is_gone_is_not_mistaken_for_it():
    """An optimizer that is gone before its first step leaves its parameters' numbers to a model that nobody trains."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(64, 64))], lr=0.1)
    number = id(optimizer.param_groups[0]["params"][0])
    with looking() as (seen, owners):
        owners.follow(optimizer)
        network(1)(batch())  # so that the parameters are read
        assert not is_torchs_own()
        teacher = network().requires_grad_(False)
        del optimizer
        gc.collect()
        teacher[0].weight = of_number(number, lambda: nn.Parameter(torch.randn(64, 64), requires_grad=False))
        teacher(batch())
        assert seen == []


def test_no_thread_gets_past_the_first_look():
    """While the owner of the weights is dealt with, another thread's call of it waits: it would not be under autocast."""
    model, order, others = network(), [], []

    def call():
        model(batch())
        order.append("called")

    def found(module, own):
        others.append(threading.Thread(target=call))
        others[0].start()
        others[0].join(0.2)
        order.append("found")

    with looking(adamw(model), found=found):
        call()
        others[0].join()
    assert order[0] == "found"
    assert len(order) == 3


def test_a_look_that_fails_is_not_made_again():
    model = network()

    def found(module, own):
        raise ValueError("found")

    with looking(adamw(model), found=found):
        with pytest.raises(ValueError, match="found"):  # here nothing guards it
            model(batch())
        assert is_torchs_own()


@pytest.mark.parametrize("params", ["own", "another model's", "tensors"])
def test_functional_call_first(params):
    """It puts other tensors in the place of the module's parameters; the module is found by its own."""
    model, other = network(0), network(1)
    given = {
        "own": dict(model.named_parameters()),
        "another model's": dict(other.named_parameters()),
        "tensors": {name: p.detach().clone() for name, p in model.named_parameters()},
    }
    with looking(adamw(model)) as (seen, _):
        torch.func.functional_call(model, given[params], (batch(),))
        assert seen == [model]
        assert is_torchs_own()


@pytest.mark.parametrize("as_argument", [False, True])
def test_a_compiled_function_that_calls_the_model(as_argument):
    """The owner is found while the function is traced. That breaks no graph, and the function is not compiled anew after it."""
    torch._dynamo.reset()
    model, graphs = Holder(network()), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(x):
        return model(x).square().mean()

    def loss_of(one, x):
        return one(x).square().mean()

    compiled = torch.compile(loss_of if as_argument else loss, backend=backend, fullgraph=True)
    arguments = (model, batch()) if as_argument else (batch(),)
    with looking(adamw(model)) as (seen, _):
        compiled(*arguments)
        assert seen == [model]
        assert is_torchs_own()
        compiled(*arguments)
        assert len(graphs) == 1
    assert "autocast" not in graphs[0].code


@pytest.mark.parametrize("way", ["export", "strict export", "trace"])
def test_an_exported_program_is_no_call_of_the_jobs(way):
    model = Holder(network())
    with looking(adamw(model)) as (seen, _):
        if way == "trace":
            torch.jit.trace(model, batch(), check_trace=False)
        else:
            torch.export.export(model, (batch(),), strict=way == "strict export")
        assert seen == []
        model(batch())
        assert seen == [model]


def test_whoever_wraps_the_call_on_top_is_left_alone():
    """Ours then stays beneath theirs, does nothing, and is found there again by the next one that looks."""
    models, optimizers, calls, seen = [network(seed) for seed in range(3)], [], [], []
    owners = Owners(lambda module, own, in_graph: seen.append(module), lambda look, *args: look(*args))

    def look_for(model):
        optimizers.append(adamw(model))
        owners.follow(optimizers[-1])

    look_for(models[0])
    ours = nn.Module.__call__

    def theirs(module, *args, **kwargs):
        calls.append(module)
        return ours(module, *args, **kwargs)

    nn.Module.__call__ = theirs
    models[0](batch())
    look_for(models[1])
    assert nn.Module.__call__ is theirs
    models[1](batch())
    assert models[1] in calls
    nn.Module.__call__ = ours
    look_for(models[2])
    models[2](batch())
    assert seen == models
    assert is_torchs_own()


def test_whoever_puts_torchs_call_back_beneath_us_is_no_obstacle():
    model, later = network(0), network(1)
    with looking(adamw(model), adamw(later)) as (seen, _):
        nn.Module.__call__, stateless._functional_call = PLAIN
        model(batch())
        assert seen == []
    optimizer = adamw(later)
    with looking(optimizer) as (seen, _):
        later(batch())
        assert seen == [later]


def test_a_call_that_somebody_has_put_back_is_replaced_again():
    """Whoever saved ``__call__`` before the job and puts it back during it; ``functional_call`` works on."""
    models = [network(), network()]
    optimizers = [adamw(model) for model in models]
    saved = nn.Module.__call__
    with looking(optimizers[0]) as (seen, owners):
        nn.Module.__call__ = saved
        owners.stop()
        owners.follow(optimizers[1])
        parameters = dict(models[1].named_parameters())
        assert torch.equal(torch.func.functional_call(models[1], parameters, batch()), models[1](batch()))
        assert seen == [models[1]]
