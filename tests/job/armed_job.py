"""Fixtures that arm this process as a job is armed; a test module names this one in ``pytest_plugins``."""

import logging
import sys
import types

import pytest
from jobs import record

from precision_policy.job import arming
from precision_policy.job.events import Listener


@pytest.fixture
def said(caplog):
    """The policy's records of a level."""
    caplog.set_level(logging.INFO, "precision_policy")
    return lambda level="WARNING": [
        r.getMessage() for r in caplog.records if r.levelname == level and r.name == "precision_policy"
    ]


@pytest.fixture
def arm():
    """Arm this process, for the time of the test."""
    stacks = []

    def start(its=None, option="precision_policy=on"):
        stack = arming.arm(its or record(), option)
        stacks.append(stack)
        return stack

    yield start
    for stack in stacks:
        stack.close()


@pytest.fixture
def armed(arm):
    """A process that is armed as a job that only warns."""
    return arm()


@pytest.fixture
def masters(monkeypatch):
    """A stand-in for what keeps master weights: a function that tells what was kept, to be replaced."""
    answers = types.SimpleNamespace(kept=lambda optimizer: None)

    class MasterWeights(Listener):
        def kept(self, optimizer):
            return answers.kept(optimizer)

    module = types.SimpleNamespace(MasterWeights=MasterWeights)
    monkeypatch.setitem(sys.modules, "precision_policy.job.master_weights", module)
    return answers
