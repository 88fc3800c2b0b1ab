"""What cannot be right stops before the job starts, with a message that names the key, the value and the fix."""

from textwrap import dedent

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+precision_policy=onn"], ["precision_policy/onn", "on", "strict", "warn"]),
        (["+precision_policy=on", "precision_policy.modell=x"], ["precision_policy.modell=x", "precision_policy.model?"]),
        (["+precision_policy=on", "+precision_policy.modell=x"], ["precision_policy.modell=x", "precision_policy.model?"]),
        (["+precision_policy=on", "precision_policy.bf16_adam=shout"], ["precision_policy.bf16_adam=shout", "warn, error"]),
        (["+precision_policy=on", "precision_policy.storage_dtype=bfloat16"], ["storage_dtype=bfloat16", "float32"]),
        (["+precision_policy=on", "precision_policy.sample=0"], ["precision_policy.sample=0", "number"]),
        (["+precision_policy=on", "precision_policy.monitor.every=-1"], ["precision_policy.monitor", "every"]),
        (["+precision_policy=on", "precision_policy.enabled=maybe"], ["precision_policy.enabled=maybe", "true or false"]),
        (["+precision_policy=on", "precision_policy.model=model.net"], ["model=model.net", "model exists", "torch_dtype"]),
        (["+precision_policy=on", "precision_policy.model=nett"], ["precision_policy.model=nett", "model, optimizer"]),
        (["+precision_policy=on", "precision_policy.model=optimizer.lr"], ["optimizer.lr holds no mapping"]),
        (["+precision_policy=on", "precision_policy.optimizer=optimizer.lr"], ["neither a mapping nor a name"]),
        (["+precision_policy=on", "precision_policy.decision=set"], ["precision_policy.decision=set", "Leave it out"]),
        (["+precision_policy=on", "precision_policy.peft=lora"], ["precision_policy.peft=lora", "model, optimizer"]),
        (["+precision_policy=on", "precision_policy.pairs={a:{optimizer:x}}"], ["precision_policy.pairs", "model: PATH"]),
    ],
)
def test_message(app, arguments, words):
    """Exit status 1, no traceback, no job."""
    run = app()(*arguments, status=1)
    assert "Traceback" not in run.err
    assert run.out == ""
    for word in words:
        assert word in run.err


def test_a_setting_that_leads_nowhere(app):
    """In the application's own config; on the command line Hydra itself refuses it."""
    run = app("precision_policy: {model: '${nowhere}'}")("+precision_policy=on", status=1)
    assert "precision_policy.model=${nowhere}: it cannot be resolved" in run.err
    assert "Traceback" not in run.err


def test_in_a_sweep(app):
    """A sweep stops before its first job."""
    run = app()("--multirun", "+precision_policy=on,warn", "precision_policy.bf16_adam=shout", status=1)
    assert "precision_policy.bf16_adam=shout" in run.err
    assert "CONFIG" not in run.out


def test_typed_field_that_refuses(app):
    """The message names the key, float32, and how to go on."""
    code = dedent("""
        import enum, hydra
        from dataclasses import dataclass, field
        from typing import Any, Optional
        from hydra.core.config_store import ConfigStore
        class D(enum.Enum):
            bf16 = 1
        @dataclass
        class Model:
            torch_dtype: Optional[D] = None
        @dataclass
        class Config:
            model: Model = field(default_factory=Model)
            optimizer: Any = field(default_factory=lambda: {'_target_': 'torch.optim.AdamW'})
        ConfigStore.instance().store('typed', Config)
        @hydra.main(version_base='1.3', config_name='typed')
        def main(cfg): print('ran')
        main()
    """)
    run = app(code=code)("+precision_policy=on", status=1)
    assert "model.torch_dtype=float32" in run.err
    assert "precision_policy=warn" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("value", ["on", "'on'", "warn", "strict"])
def test_plain_key_instead_of_the_option(app, value):
    """``precision_policy: on`` outside the defaults list would do nothing: it is an error that says what to write."""
    run = app("precision_policy: " + value)(status=1)
    assert 'precision_policy: "on"' in run.err
    assert "Traceback" not in run.err


def test_unquoted_on_in_a_defaults_list(app):
    """Hydra itself refuses it; nothing runs without the policy."""
    run = app("defaults:\n  - precision_policy: on\n  - _self_\n")(status=1)
    assert "In config: - precision_policy: true is no option of the policy" in run.err
    assert 'precision_policy: "on", quoted' in run.err
    assert "Traceback" not in run.err
