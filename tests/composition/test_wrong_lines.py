"""Settings as people type them, and the lines that they get wrong."""

import pytest
from conftest import CONFIG


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        ("net: {torch_dtype: auto}", "precision_policy.model=nett", "Did you mean precision_policy.model=net?"),
        ("model: {dtype: bfloat16}", "precision_policy.dtype_key=dtpye", "Did you mean precision_policy.dtype_key=dtype?"),
        (
            "model: {dtype: auto}\ntraining: {opt: adamw}",
            "precision_policy.optimizer=training.otp",
            "precision_policy.optimizer=training.opt?",
        ),
        ("model: {args: {}}", "precision_policy.dtype_key=agrs.dtype", "Did you mean precision_policy.dtype_key=args.dtype?"),
        (
            "model: {args: {dtype: bfloat16}}",
            "precision_policy.dtype_key=args.dtpye",
            "model.args has no dtpye.\nDid you mean precision_policy.dtype_key=args.dtype?",
        ),
    ],
)
def test_did_you_mean(app, config, override, words):
    run = app(f"{config}\noptimizer: {{_target_: torch.optim.AdamW}}")("+precision_policy=on", override, status=1)
    assert words in run.err
    assert "Traceback" not in run.err


WRONG = [
    (["+precision_policy=true"], "+precision_policy=true: the policy is an option of a config group"),
    (["+precision_policy=1"], "+precision_policy=1: the policy is an option of a config group"),
    (["+precision_policy=on", "+precision_policy.decision.rule=set"], "precision_policy.decision="),
]


@pytest.mark.parametrize("multirun", [[], ["--multirun"]], ids=["run", "sweep"])
@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_no_traceback_for_a_wrong_line(app, multirun, arguments, words):
    run = app()(*multirun, *arguments, status=1)
    assert words in run.err
    assert "Traceback" not in run.err
    assert "CONFIG" not in run.out


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_the_same_in_the_compose_api(compose, arguments, words):
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException) as error:
        compose(CONFIG, *arguments)
    assert words in str(error.value)


def test_an_unquoted_on_elsewhere(app, compose):
    """In an experiment's defaults list, in a sweep, and in the Compose API."""
    from hydra.errors import ConfigCompositionException

    train = app("defaults:\n  - experiment: null\n  - _self_\n" + CONFIG)
    train.write("conf/experiment/full.yaml", "# @package _global_\ndefaults:\n  - override /precision_policy: on\n")
    for arguments in (["experiment=full"], ["--multirun", "experiment=full"]):
        run = train(*arguments, status=1)
        assert "override /precision_policy: true is no option of the policy" in run.err
        assert "Traceback" not in run.err
    with pytest.raises(ConfigCompositionException, match="quoted, in a defaults list"):
        compose("defaults:\n  - precision_policy: on\n  - _self_\n")
