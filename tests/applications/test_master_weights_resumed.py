"""A run that is stopped and resumed equals the uninterrupted one, in the frameworks that people train with."""

import re

import pytest

pytestmark = pytest.mark.once

FIRST = {"trainer": "trained/checkpoint-3", "lightning": "trained/epoch=0.ckpt", "accelerate": "trained/epoch=0"}


def told(run, name):
    """What the application printed under a name."""
    return re.findall(rf"^{name} (.*)$", run.out, re.MULTILINE)[-1]


@pytest.mark.parametrize("framework", FIRST)
def test_resumed_runs_equal_uninterrupted_ones(application, framework):
    """Weights, moments and low bits, bit for bit; the application and its config know nothing of the policy."""
    train = application("resumed")
    run = [f"framework={framework}", "+precision_policy=master_weights"]
    whole = train(*run)
    assert told(whole, "DTYPES").startswith("['torch.bfloat16'] KEYS exp_avg exp_avg_sq master_low_bits step")
    assert "updated in fp32 by master weights" in whole.log
    assert FIRST[framework] in told(whole, "SAVED")
    resumed = train(*run, f"checkpoint='{FIRST[framework]}'")
    assert told(resumed, "DIGEST") == told(whole, "DIGEST")
    once = train(*run, "epochs=1")
    assert told(once, "DIGEST") != told(whole, "DIGEST")


def test_more_weights_move_than_without(application):
    """The model stays bf16 either way."""
    train = application("resumed")
    as_is = train("framework=accelerate")
    kept = train("framework=accelerate", "+precision_policy=master_weights")
    assert "master_low_bits" not in told(as_is, "DTYPES")
    assert int(told(kept, "MOVED")) > int(told(as_is, "MOVED"))
