"""What a setting may hold, and what is said where it holds something else."""

import pytest
from conftest import ROOT

from precision_policy.composition.settings import TABLE, SettingError, parse

CONFIG = "model: {torch_dtype: auto}\noptimizer: {_target_: torch.optim.AdamW, lr: 1}\n"

LOSS_SCALING = "needs loss scaling, which only the application can do"

# A setting in the command line's words, and what its error names beside key and value.
WRONG = [
    ("modell=x", ["precision_policy.model?", "Its settings are"]),
    ("zzz=1", ["Its settings are"]),
    ("decision=set", ["Leave it out"]),
    ("enabled=maybe", ["true or false"]),
    ("write=1", ["true or false"]),
    ("master_weights=yes", ["true or false"]),
    ("model=a..b", ["dotted path"]),
    ("optimizer=3", ["dotted path"]),
    ("peft=true", ["dotted path"]),
    ("dtype_key=3", ["key's name"]),
    ("storage_dtype=bfloat16", ["float32"]),
    ("storage_dtype=true", ["float32"]),
    *[(f"compute_dtype={fp16}", [LOSS_SCALING]) for fp16 in ("float16", "fp16", "torch.float16", "half", "16")],
    ("compute_dtype=fp8", ["bfloat16"]),
    ("bf16_adam=shout", ["warn, error"]),
    ("sample=0", ["number"]),
    ("sample=true", ["number"]),
    ("sample=1.5", ["number"]),
    ("monitor=3", ["every"]),
    ("model=model.net", ["model exists", "torch_dtype"]),
    ("model=nett", ["The config holds at its top: model, optimizer"]),
    ("model=modle", ["Did you mean precision_policy.model=model?"]),
    ("model=optimizer.lr", ["optimizer.lr holds no mapping"]),
    ("optimizer=optimizer.lr", ["neither a mapping nor a name"]),
    ("peft=lora", ["the config has no lora"]),
    ("dtype_key=torch_dtpye", ["Did you mean precision_policy.dtype_key=torch_dtype?"]),
]


@pytest.mark.parametrize(("words", "told"), WRONG)
def test_what_cannot_be_right(compose, words, told):
    """An error that names the key, the value and the fix, before any job starts."""
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException) as error:
        compose(CONFIG, "+precision_policy=on", f"precision_policy.{words}")
    assert str(error.value).startswith(f"precision_policy.{words}: ")
    for word in told:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("monitor", {"every": -1}),
        ("monitor", {"evry": 1}),
        ("pairs", {"a": {"optimizer": "x"}}),
        ("pairs", {"a": {"model": "x", "lr": "y"}}),
        ("pairs", {"a": {"model": "x", "optimizer": None}}),
        ("pairs", {"a": "x"}),
        ("dtype_key", ""),
    ],
)
def test_mappings_that_cannot_be_right(setting, value):
    with pytest.raises(SettingError, match=f"precision_policy.{setting}="):
        parse({setting: value})


def test_values_as_people_type_them():
    """Hydra reads 1e6 as a float, and bf16 has several names."""
    settings = parse({"sample": 1.0e6, "compute_dtype": "torch.bfloat16", "monitor": {}, "master_weights": True})
    assert (settings.sample, settings.compute_dtype, settings.monitor) == (1_000_000, "bfloat16", {"every": 0})
    assert settings.chosen == {"sample", "compute_dtype", "monitor", "master_weights"}


def test_a_wrong_setting_ends_in_a_message(application):
    """No traceback and no job: also of a setting that only the application's files hold."""
    run = application("bf16_weight")("+precision_policy=on", "precision_policy.bf16_adam=shout", status=1)
    assert "precision_policy.bf16_adam=shout" in run.err
    assert "Traceback" not in run.err
    assert run.out == ""


def test_a_setting_that_leads_nowhere(compose):
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException, match=r"precision_policy.model=.*nowhere.*cannot be resolved"):
        compose(CONFIG + "precision_policy: {model: '${nowhere}'}", "+precision_policy=on")


def test_the_page_of_settings_has_every_setting():
    """Its table is made of the settings' own words."""
    page = (ROOT / "docs/settings.md").read_text()
    for setting in TABLE:
        assert f"| `{setting.name}` | {setting.metadata['shown']} | {setting.metadata['meaning']} |" in page
