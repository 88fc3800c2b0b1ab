"""A process that the job starts is armed as the job is."""

import multiprocessing
import pickle
import sys
from multiprocessing.process import BaseProcess

import pytest
from jobs import record
from words import LOST

from precision_policy.job import spawned
from precision_policy.job.speaker import Speaker

OPTIONS = ["+precision_policy=on", "precision_policy.monitor.every=2"]


@pytest.mark.parametrize("depth", [0, 1])
def test_what_a_spawned_process_says(application, depth):
    """The warning, the confirmation and the monitor, in a process of the job's and in one that this starts in turn."""
    run = application("spawns")(*OPTIONS, f"depth={depth}", python=sys.executable)
    said = run.out + run.err
    assert said.count(LOST) == 1
    assert said.count("1 trainable tensor, 16 elements: stored in bf16, updated in bf16") == 1
    assert said.count("step 2: 100.0% of a sample of 16 weights left unchanged") == 1


@pytest.mark.once
def test_what_travels(monkeypatch):
    """The record, the option and what was said already; a process that needs no torch is not made to import it."""
    calls = []
    speaker, its = Speaker(["warning"]), record()
    monkeypatch.setattr("test_spawned.armed_with", calls.append, raising=False)
    passenger = spawned._Passenger(arm, its, "precision_policy=on", speaker)
    pickle.loads(pickle.dumps(passenger))
    assert calls == [(its, "precision_policy=on", frozenset({"warning"}))]
    monkeypatch.delitem(sys.modules, "torch")
    assert spawned.arm_here(arm, its, "precision_policy=on", frozenset()) is None
    assert len(calls) == 1


def arm(*arguments):
    armed_with(arguments)  # noqa: F821 - the test puts it here


@pytest.mark.once
def test_process_starts_as_before():
    """Also where somebody has wrapped the start in turn: what is below does nothing after the job."""
    before = BaseProcess.start
    with spawned.follow(arm, record(), "precision_policy=on", Speaker()):
        ours = BaseProcess.start
        assert ours is not before
    assert BaseProcess.start is before
    process = multiprocessing.get_context("fork").Process(target=len, args=("",))
    ours(process)
    process.join()
    assert process.exitcode == 0
    assert not hasattr(process, "_precision_policy")


@pytest.mark.once
def test_a_process_that_cannot_be_armed_goes_on(caplog):
    """A diagnosis that fails ends no process of the application's."""

    def fails(*arguments):
        raise KeyError("of another torch")

    assert spawned.arm_here(fails, record(), "precision_policy=on", frozenset()) is None
    assert "precision_policy=on: a process that the job has started is not watched" in caplog.text
