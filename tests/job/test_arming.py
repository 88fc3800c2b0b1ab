"""What a job arms, and that torch is as it was when the job is over."""

import pytest
import torch
from jobs import record, step, weights
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from precision_policy.job import arming
from precision_policy.job.events import Events

pytest_plugins = ["armed_job"]


@pytest.mark.once
def test_torch_is_as_it_was(arm):
    before = torch.optim.Optimizer.__init__
    stack = arm(record(monitor_every=1))
    assert torch.optim.Optimizer.__init__ is not before
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    step(optimizer)
    stack.close()
    stack.close()  # a second time it does nothing
    assert torch.optim.Optimizer.__init__ is before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


@pytest.mark.once
def test_two_hooks_and_no_more(arm):
    """However much is armed."""
    arm(record(monitor_every=1))
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    step(optimizer)
    assert len(_global_optimizer_pre_hooks) == len(_global_optimizer_post_hooks) == 1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.once
def test_a_policy_that_is_off_arms_nothing():
    before = torch.optim.Optimizer.__init__
    with arming.arm(record(enabled=False), "precision_policy=off"):
        assert torch.optim.Optimizer.__init__ is before


@pytest.mark.once
def test_what_is_armed_and_in_which_order(arm, masters, monkeypatch):
    """The confirmation asks those that come before it."""
    armed = []
    monkeypatch.setattr(Events, "start", lambda events: armed.append([type(one).__name__ for one in events._listeners]))
    arm(record())
    arm(record(master_weights=True, monitor_every=3))
    assert armed == [
        ["Storage", "Confirmation", "Compute"],
        ["Storage", "MasterWeights", "Confirmation", "Compute", "Monitor"],
    ]


@pytest.mark.once
def test_everything_is_undone_where_one_undoing_fails(arm, said, monkeypatch):
    """The job goes on."""
    monkeypatch.setattr("precision_policy.job.confirmation.Confirmation.end", lambda self: 1 / 0)
    before = torch.optim.Optimizer.__init__
    arm().close()
    assert torch.optim.Optimizer.__init__ is before
    assert len(said()) == 1


@pytest.mark.once
def test_someone_wrapped_on_top(arm, said):
    """Their wrapper stays; what is below it sleeps."""
    before = torch.optim.Optimizer.__init__
    stack = arm()
    inner = torch.optim.Optimizer.__init__
    theirs = lambda self, *args, **kwargs: inner(self, *args, **kwargs)  # noqa: E731
    torch.optim.Optimizer.__init__ = theirs
    try:
        stack.close()
        assert torch.optim.Optimizer.__init__ is theirs
        torch.optim.AdamW(weights(), lr=1e-5)
        assert said() == []
    finally:
        torch.optim.Optimizer.__init__ = before


@pytest.mark.once
def test_hooks_of_others_survive_the_first_step(armed):
    """A hook that others registered after ours is neither lost nor tripped over."""
    seen = []
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    step(optimizer)
    step(optimizer)
    assert seen == ["pre", "post"] * 2
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


@pytest.mark.once
def test_a_hook_that_registers_hooks(armed):
    """Somebody's hook before the step registers one after it: nothing is walked over while it changes."""
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    seen, theirs = [], []

    def register_once(*a):
        if not theirs:
            theirs.append(optimizer.register_step_post_hook(lambda *a: seen.append("post")))

    optimizer.register_step_pre_hook(register_once)
    for _ in range(3):
        step(optimizer)
    assert seen == ["post"] * 3
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


def test_faults_leave_torch_as_it_was(application):
    """Also a KeyboardInterrupt, of which Hydra 1.3 tells no callback."""
    run = application("faults")()
    assert run.out.endswith("CLEAN\n")
    assert run.out.count("[precision_policy][WARNING]") == 4
