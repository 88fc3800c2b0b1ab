"""Who speaks, and that what is said arrives."""

import logging
import threading

import pytest
from words import LOST

from precision_policy.job.speaker import Speaker

pytest_plugins = ["armed_job"]


@pytest.mark.once
def test_once(said):
    speaker = Speaker(said=["before"])
    for what in ("before", "now", "now"):
        speaker.say_once(what, logging.WARNING, "a text")
    assert said() == ["a text"]
    speaker.forget("now")
    speaker.say_once("now", logging.WARNING, "again")
    assert said() == ["a text", "again"]


@pytest.mark.once
def test_other_ranks_are_silent(said, monkeypatch):
    """What rank zero says counts as said on each."""
    monkeypatch.setenv("RANK", "1")
    speaker = Speaker()
    speaker.say_once("what", logging.WARNING, "a text")
    speaker.say(logging.WARNING, "a text")
    assert said() == []
    assert not speaker.is_first("what")


@pytest.mark.once
def test_threads():
    """One of many is the first."""
    speaker, first, barrier = Speaker(), [], threading.Barrier(8)

    def ask():
        barrier.wait()
        first.append(speaker.is_first("what"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(first) == 1


@pytest.mark.parametrize("by", ["dict", "file"])
def test_an_application_that_configures_logging(application, by):
    """It disables our logger; the warning and the confirmation come all the same, through its own handlers."""
    run = application("logs")("+precision_policy=on", f"by={by}")
    assert run.err.count(f"precision_policy=on: {LOST}") == 1
    assert run.err.count("precision_policy=on: 1 trainable tensor, 16 elements: stored in bf16, updated in bf16") == 1
    assert "the application goes on" in run.err


@pytest.mark.parametrize("by", ["dict", "file"])
def test_a_sweep_of_an_application_that_configures_logging(application, by):
    """For all later jobs too."""
    run = application("logs")("--multirun", "+precision_policy=on,warn", f"by={by}", "+again=1,2")
    assert run.err.count("over bf16 weights, no fp32 master copy") == 4
    assert run.err.count("stored in bf16, updated in bf16") == 4
