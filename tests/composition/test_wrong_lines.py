"""Settings as people type them, and the lines that they get wrong."""

import pytest
from conftest import ADAMW, AUTO


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("precision_policy.model=nett", "Did you mean precision_policy.model=net?"),
        ("precision_policy.dtype_key=dtpye", "Did you mean precision_policy.dtype_key=dtype?"),
        ("precision_policy.optimizer=training.otp", "precision_policy.optimizer=training.opt?"),
        ("precision_policy.dtype_key=agrs.dtype", "Did you mean precision_policy.dtype_key=args.dtype?"),
        (
            "precision_policy.dtype_key=kwargs.dtpye",
            "model.kwargs has no dtpye.\nDid you mean precision_policy.dtype_key=kwargs.dtype?",
        ),
    ],
)
def test_did_you_mean(application, override, words):
    assert words in application("idle").refuses("--config-name", "mistyped", "+precision_policy=on", override)


WRONG = [
    (["+precision_policy=true"], "+precision_policy=true: the policy is an option of a config group"),
    (["+precision_policy=1"], "+precision_policy=1: the policy is an option of a config group"),
    (["+precision_policy=on", "+precision_policy.decision.rule=set"], "precision_policy.decision="),
]


@pytest.mark.parametrize("multirun", [[], ["--multirun"]], ids=["run", "sweep"])
@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_no_traceback_for_a_wrong_line(application, multirun, arguments, words):
    assert words in application("idle").refuses(*multirun, *arguments)


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_the_same_in_the_compose_api(compose, arguments, words):
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException) as error:
        compose(AUTO + ADAMW, *arguments)
    assert words in str(error.value)


def test_an_unquoted_on_elsewhere(application, compose):
    """In an experiment's defaults list, in a sweep, and in the Compose API."""
    from hydra.errors import ConfigCompositionException

    train = application("bf16_weight")
    for multirun in ([], ["--multirun"]):
        told = train.refuses("--config-name", "experiments", *multirun, "experiment=unquoted")
        assert "override /precision_policy: true is no option of the policy" in told
    with pytest.raises(ConfigCompositionException, match="quoted, in a defaults list"):
        compose("defaults:\n  - precision_policy: on\n  - _self_\n")
