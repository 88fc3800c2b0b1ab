"""The decision table, as the Compose API shows it."""

from textwrap import dedent

import pytest
from omegaconf import OmegaConf

from precision_policy.composition import peft

ADAMW = "optimizer: {_target_: torch.optim.AdamW}\n"
AUTO = "model: {torch_dtype: auto}\n"


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (ADAMW, "no_model"),
        ("model: gpt2\n" + ADAMW, "no_model"),
        (AUTO + ADAMW + "peft: {r: 8}", "peft"),
        (AUTO, "no_optimizer"),
        (AUTO + "optimizer: null", "no_optimizer"),
        (AUTO + "optimizer: {_target_: bitsandbytes.optim.AdamW8bit}", "not_torch_optim"),
        (AUTO + "optimizer: {_target_: torch.optim.lr_scheduler.StepLR}", "not_torch_optim"),
        (AUTO + "optimizer: {_target_: torch.optim.swa_utils.AveragedModel}", "not_torch_optim"),
        (AUTO + "optimizer: {lr: 1}", "not_torch_optim"),
        ("model: {torch_dtype: bfloat16}\n" + ADAMW, "explicit_dtype"),
        ("model: {dtype: float16, torch_dtype: auto}\n" + ADAMW, "explicit_dtype"),
        ("model: {torch_dtype: '???'}\n" + ADAMW, "explicit_dtype"),
        ("model: {torch_dtype: '${nowhere}'}\n" + ADAMW, "explicit_dtype"),
        ("model: {torch_dtype: {_target_: hydra.utils.get_object, path: torch.bfloat16}}\n" + ADAMW, "explicit_dtype"),
        ("model: {_target_: torch.nn.Linear, in_features: 1}\n" + ADAMW, "target_takes_no_dtype"),
        ("model: {_target_: builtins.object}\n" + ADAMW, "target_takes_no_dtype"),
        ("model: {_target_: no.such.thing}\n" + ADAMW, "target_takes_no_dtype"),
        ("model: {_target_: '???'}\n" + ADAMW, "target_takes_no_dtype"),
        ("model: {_target_: '${nowhere}'}\n" + ADAMW, "target_takes_no_dtype"),
        (AUTO + ADAMW, "set"),
        ("model: {torch_dtype: null}\n" + ADAMW, "set"),
        ("model: {dtype: auto}\n" + ADAMW, "set"),
        ("model: {}\n" + ADAMW, "no_dtype_key"),
        ("model: {_target_: transformers.AutoModelForCausalLM.from_pretrained}\n" + ADAMW, "set"),
        ("model: {_target_: no.such.Model.from_config}\n" + ADAMW, "set"),
        (AUTO + "optimizer: {_target_: torch.optim.sgd.SGD}", "set"),
    ],
)
def test_rule(decide, config, rule):
    """The first rule of the table that holds is the one recorded."""
    assert decide(config).rule == rule


def test_order(decide):
    """Each rule comes before those below it, though theirs hold too."""
    below = "model: {torch_dtype: bfloat16}\npeft: true\n"
    assert decide("peft: true").rule == "no_model"
    assert decide(below).rule == "peft"
    assert decide(below.replace("true", "false")).rule == "no_optimizer"
    assert decide(below.replace("true", "false") + "optimizer: {_target_: a.B}").rule == "not_torch_optim"


def test_set_writes_one_key_and_nothing_else(compose):
    """The config differs in the decided key and in the policy's own node."""
    config = "model: {torch_dtype: auto, name: x, inner: {dtype: null}}\noptimizer: {_target_: torch.optim.AdamW, lr: '${lr}'}\nlr: 1"
    off, on = (OmegaConf.to_container(compose(config, *extra)) for extra in ([], ["+precision_policy=on"]))
    decision = on.pop("precision_policy")["decision"]
    off["model"]["torch_dtype"] = "float32"
    assert on == off
    assert {key: decision[key] for key in ("rule", "key", "before", "after", "fix", "fp32", "added")} == {
        "rule": "set",
        "key": "model.torch_dtype",
        "before": "auto",
        "after": "float32",
        "fix": "model.torch_dtype=float32",
        "fp32": True,
        "added": False,
    }
    assert decision["reason"] == "torch.optim.AdamW keeps no fp32 master copy (keep bf16: model.torch_dtype=bfloat16)"


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("{torch_dtype: auto}", "torch_dtype"),
        ("{dtype: null}", "dtype"),
        ("{torch_dtype: null, dtype: auto}", "dtype"),
        ("{name: gpt2}", None),
        ("{_target_: transformers.AutoModelForCausalLM.from_pretrained}", "torch_dtype"),
        ("{_target_: target_models.TakesDtype}", "dtype"),
        ("{_target_: target_models.TakesTorchDtype}", "torch_dtype"),
        ("{_target_: target_models.TakesAnything}", "torch_dtype"),
        ("{_target_: target_models.TakesNothing}", None),
        ("{_target_: target_models.TakesObjectsOnly}", None),
        ("{_target_: target_models.broken.Model}", None),
    ],
)
def test_which_key(compose, model, written, tmp_path, monkeypatch):
    """An existing key is kept; an absent one is added only where its target is known to take it."""
    (tmp_path / "target_models").mkdir()
    (tmp_path / "target_models/__init__.py").write_text(
        dedent("""
            class TakesDtype:
                def __init__(self, dtype=None): ...
            class TakesTorchDtype:
                def __init__(self, torch_dtype: str | None = None, **kwargs): ...
            class TakesAnything:
                def __init__(self, **kwargs): ...
            class TakesNothing:
                def __init__(self, size=1): ...
            class TakesObjectsOnly:
                def __init__(self, dtype: 'torch.dtype' = None): ...
        """)
    )
    (tmp_path / "target_models/broken.py").write_text("raise SystemExit('no')")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = compose(f"model: {model}").model
    cfg = compose(f"model: {model}\n{ADAMW}", "+precision_policy=on")
    changed = {key for key in cfg.model if key not in before or cfg.model[key] != before[key]}
    assert changed == ({written} if written else set())
    assert cfg.precision_policy.decision.key == (f"model.{written}" if written else None)


TYPED = """
import json
from dataclasses import dataclass, field
from typing import Any, Optional

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

@dataclass
class Text:
    torch_dtype: Optional[str] = None

@dataclass
class Bare:
    size: int = 1

def optimizer():
    return {"_target_": "torch.optim.AdamW"}

@dataclass
class WithText:
    model: Text = field(default_factory=Text)
    optimizer: Any = field(default_factory=optimizer)

@dataclass
class WithBare:
    model: Bare = field(default_factory=Bare)
    optimizer: Any = field(default_factory=optimizer)

ConfigStore.instance().store("text", WithText)
ConfigStore.instance().store("bare", WithBare)

@hydra.main(version_base="1.3", config_name="text")
def main(cfg):
    print("CONFIG " + json.dumps(OmegaConf.to_container(cfg)))

main()
"""


def test_typed_nodes(app):
    """A typed field takes float32 where its type does; where there is no such field, the node is left alone."""
    train = app(code=TYPED)
    assert train("+precision_policy=on").config["model"] == {"torch_dtype": "float32"}
    bare = train("--config-name", "bare", "+precision_policy=on").config
    assert bare["model"] == {"size": 1}
    assert bare["precision_policy"]["decision"]["rule"] == "target_takes_no_dtype"
    assert "typed as Bare" in bare["precision_policy"]["decision"]["reason"]


def test_read_only_root(app):
    """A config that its application made read-only is written all the same, and stays read-only."""
    code = dedent("""
        import json, hydra
        from dataclasses import dataclass, field
        from typing import Any
        from hydra.core.config_store import ConfigStore
        from omegaconf import OmegaConf
        @dataclass(frozen=True)
        class Config:
            model: Any = field(default_factory=lambda: {'torch_dtype': 'auto'})
            optimizer: Any = field(default_factory=lambda: {'_target_': 'torch.optim.AdamW'})
        ConfigStore.instance().store('frozen', Config)
        @hydra.main(version_base='1.3', config_name='frozen')
        def main(cfg):
            assert OmegaConf.is_readonly(cfg)
            print('CONFIG ' + json.dumps(OmegaConf.to_container(cfg)))
        main()
    """)
    assert app(code=code)("+precision_policy=on").config["model"] == {"torch_dtype": "float32"}


def test_missing_dtype_is_left_for_hydra_to_ask_for(compose):
    """A ``???`` stays one."""
    cfg = compose("model: {torch_dtype: '???'}\n" + ADAMW, "+precision_policy=on")
    assert OmegaConf.is_missing(cfg.model, "torch_dtype")


def test_interpolation_that_names_no_dtype(compose):
    """It is replaced at this node only, and the decision says where it pointed."""
    cfg = compose("dtype: auto\nmodel: {torch_dtype: '${dtype}'}\n" + ADAMW, "+precision_policy=on")
    assert (cfg.dtype, cfg.model.torch_dtype) == ("auto", "float32")
    assert "pointed at dtype" in cfg.precision_policy.decision.reason


def test_warn_never_sets(compose):
    """``warn`` records what it would have set."""
    cfg = compose(AUTO + ADAMW, "+precision_policy=warn")
    assert (cfg.model.torch_dtype, cfg.precision_policy.decision.rule) == ("auto", "warn_only")


def test_off_is_an_explicit_nothing(compose):
    """``off`` takes every setting, decides nothing and leaves no ??? behind."""
    cfg = compose(AUTO + ADAMW, "+precision_policy=off", "precision_policy.model=elsewhere")
    assert cfg.model.torch_dtype == "auto"
    assert cfg.precision_policy.decision is None
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("override", ["precision_policy.storage_dtype=fp32", "precision_policy.storage_dtype=torch.float32"])
def test_storage_dtype_in_the_projects_words(compose, override):
    """What is written is what was asked for, letter by letter."""
    cfg = compose(AUTO + ADAMW, "+precision_policy=on", override)
    assert cfg.model.torch_dtype == override.partition("=")[2]


def test_the_applications_own_settings_survive_the_option(compose):
    """Settings in the application's config wait for ``+precision_policy=on`` and are not overridden by it."""
    config = "net: {torch_dtype: auto}\nprecision_policy: {model: net, bf16_adam: ignore}\n" + ADAMW
    assert compose(config).precision_policy == {"model": "net", "bf16_adam": "ignore"}
    cfg = compose(config, "+precision_policy=on")
    assert cfg.net.torch_dtype == "float32"
    assert cfg.precision_policy.bf16_adam == "ignore"


def test_a_node_of_another_meaning_is_left_alone(compose):
    """An application may use the name for something of its own."""
    config = "precision_policy: {param_dtype: bf16}\n" + AUTO + ADAMW
    assert compose(config).precision_policy == {"param_dtype": "bf16"}


def test_what_is_not_the_jobs_hides_nothing_after_it():
    cfg = OmegaConf.create({"hydra": {"lora": {"r": 4}}, "precision_policy": {}, "adapters": {"lora": {"r": 8}}})
    assert peft.on_anywhere(cfg) == "adapters.lora is there"
