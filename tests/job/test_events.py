"""What happens to optimizers is told once, in order, and torch is as it was afterwards."""

import copy
import logging
import pickle

import pytest
import torch
from torch.optim import Optimizer

from precision_policy.job.events import Events, Listener, StopJobError
from precision_policy.job.speaker import Speaker


class Recording(Listener):
    """Notes what it hears."""

    def __init__(self, heard):
        self.heard = heard

    def made(self, optimizer):
        self.heard.append(("made", type(optimizer).__name__))

    def about_to_step(self, optimizer):
        self.heard.append(("about to step", type(optimizer).__name__))

    def around_step(self, optimizer, step, args, kwargs):
        self.heard.append(("in", type(optimizer).__name__))
        result = step(optimizer, *args, **kwargs)
        self.heard.append(("out", type(optimizer).__name__))
        return result

    def stepped(self, optimizer):
        self.heard.append(("stepped", type(optimizer).__name__))

    def around_load(self, optimizer, load, args, kwargs):
        self.heard.append(("loading", type(optimizer).__name__))
        return load(optimizer, *args, **kwargs)

    def end(self):
        self.heard.append(("end", None))


class Early(torch.optim.NAdam):
    """A subclass without a step of its own, made before its base ever was."""


class Calling(torch.optim.Adamax):
    """A subclass that calls torch's step with arguments of its own."""

    def step(self, loss, closure=None):
        return super().step(closure)


@pytest.fixture
def heard():
    return []


@pytest.fixture
def events(heard):
    made = Events([Recording(heard)], Speaker())
    made.start()
    yield made
    made.end()


def parameter():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones_like(param)
    return param


def words(heard):
    return [word for word, _ in heard]


STEP = ["about to step", "in", "out", "stepped"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Early])
def test_a_step_is_told_once_from_outside_in(events, heard, kind):
    """Also where a class inherits its step."""
    optimizer = kind([parameter()])
    optimizer.step()
    optimizer.step()
    assert words(heard) == ["made", *STEP, *STEP]


def test_a_step_with_arguments_of_its_own(events, heard):
    """The innermost class is gone around: the application's own may call it as it likes."""
    optimizer = Calling([parameter()])
    assert optimizer.step("loss", lambda: 5) == 5
    # torch runs the step hooks of both classes, where an optimizer of the inner one was made before in this process.
    assert [word for word in words(heard) if word in ("made", "in", "out")] == ["made", "in", "out"]


def test_copies_are_served_too(events, heard):
    """Unpickled and copied optimizers were never constructed."""
    optimizer = torch.optim.SGD([parameter()])
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        del heard[:]
        again.step()
        assert words(heard) == STEP
        again.load_state_dict(optimizer.state_dict())
        assert words(heard) == [*STEP, "loading"]


def test_several_listeners_stand_around_one_another(heard):
    """The first is the outermost, and hears of the end last."""
    outer, inner = [], []
    events = Events([Recording(outer), Recording(inner)], Speaker())

    class Both(list):
        def __init__(self, name):
            self.name = name

        def append(self, what):
            heard.append((self.name, what[0]))

    events._listeners[0].heard, events._listeners[1].heard = Both("outer"), Both("inner")
    events.start()
    torch.optim.SGD([parameter()]).step()
    events.end()
    names = [name for name, word in heard if word in ("in", "out", "end")]
    assert names == ["outer", "inner", "inner", "outer", "inner", "outer"]


def test_an_exception_in_a_step_passes_and_is_not_told_as_stepped(events, heard):
    optimizer = torch.optim.SGD([parameter()])

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert words(heard) == ["made", "about to step", "in"]


def own_steps():
    """The step of each class of torch.optim, and what is inside torch's hooks there."""
    found = {}
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Rprop, torch.optim.RAdam):
        step = kind.__dict__.get("step")
        found[kind] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return found


def test_at_the_end_torch_is_as_it_was():
    """Also classes whose first optimizer was made meanwhile, and those that inherit from them."""
    torch.optim.RAdam([parameter()])
    before = own_steps()
    hooked = torch.optim.RAdam.__dict__["step"]
    methods = {name: Optimizer.__dict__[name] for name in ("__init__", "_patch_step_function", "load_state_dict")}
    heard = []
    events = Events([Recording(heard)], Speaker())
    events.start()
    survivors = [kind([parameter()]) for kind in own_steps()]
    for optimizer in survivors:
        optimizer.step()
    events.end()
    assert torch.optim.RAdam.__dict__["step"] is hooked
    raws = {step for step in before.values() if step is not None}
    for step in own_steps().values():
        assert step in raws or step is torch.optim.Adam.__dict__["step"].__wrapped__
    assert {name: Optimizer.__dict__[name] for name in methods} == methods
    del heard[:]
    for optimizer in survivors:
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    torch.optim.Rprop([parameter()]).step()
    assert heard == []


def test_a_wrapper_that_somebody_wrapped_in_turn_does_nothing_after_the_end(events, heard):
    """A scheduler keeps the step that it found."""
    optimizer = torch.optim.SGD([parameter()])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    events.end()
    del heard[:]
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    optimizer.step()
    assert heard == []
    assert not torch.equal(before, optimizer.param_groups[0]["params"][0])


def test_nothing_is_wrapped_for_those_who_leave_the_step_as_it_is():
    step = torch.optim.SGD.__dict__["step"]
    events = Events([Listener()], Speaker())
    events.start()
    torch.optim.SGD([parameter()]).step()
    now = torch.optim.SGD.__dict__["step"]
    events.end()
    assert now is step or now.__wrapped__ is step


class Failing(Listener):
    def __init__(self, error):
        self.error = error

    def made(self, optimizer):
        raise self.error


def test_a_diagnosis_that_fails_ends_no_job(caplog):
    """It is said once."""
    events = Events([Failing(ZeroDivisionError())], Speaker(), "precision_policy=on")
    events.start()
    with caplog.at_level(logging.WARNING, "precision_policy"):
        for _ in range(2):
            torch.optim.SGD([parameter()]).step()
    events.end()
    assert [record.message for record in caplog.records] == [
        "precision_policy=on: an optimizer could not be judged; the job goes on"
    ]


def test_an_error_that_is_meant_to_stop_the_job_does():
    events = Events([Failing(StopJobError("stop"))], Speaker())
    events.start()
    with pytest.raises(StopJobError, match="stop"):
        torch.optim.SGD([parameter()])
    events.end()


@pytest.mark.newest
def test_whether_a_step_comes_here(events):
    """Not where a scheduler took it before the class was served."""
    served = torch.optim.SGD([parameter()])
    torch.optim.lr_scheduler.StepLR(served, 1)
    assert events.reaches(served)
    assert events.reaches(Calling([parameter()]))
    others = Events([Recording([])], Speaker())
    assert not others.reaches(served)
