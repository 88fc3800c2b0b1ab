"""Where real projects put the model, the optimizer and PEFT; the README's table is made of these lines."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

ADAMW = "{_target_: torch.optim.AdamW, lr: 1e-5}"
LOAD = "{_target_: transformers.AutoModel.from_pretrained}"

# Layout in words, config, the user's line after +precision_policy=on, the key that is set.
README_TABLE = [
    ("everything at the top", f"model: {LOAD}\noptimizer: {ADAMW}", "", "model.torch_dtype"),
    (
        "nested nodes",
        f"method: {{model: {LOAD}}}\ntraining: {{optimizer: {ADAMW}}}",
        "precision_policy.model=method.model precision_policy.optimizer=training.optimizer",
        "method.model.torch_dtype",
    ),
    (
        "the optimizer inside the model (Lightning)",
        f"model: {{net: {LOAD}, optimizer: {{_target_: torch.optim.AdamW, _partial_: true}}}}",
        "precision_policy.model=model.net precision_policy.optimizer=model.optimizer",
        "model.net.torch_dtype",
    ),
    (
        "an optimizer by name",
        f"model: {LOAD}\ntraining: {{optim: adamw_torch}}",
        "precision_policy.optimizer=training.optim",
        "model.torch_dtype",
    ),
    (
        "the dtype under a name of the project's own",
        f"model: {{policy_dtype: null}}\noptimizer: {ADAMW}",
        "precision_policy.dtype_key=policy_dtype",
        "model.policy_dtype",
    ),
    (
        "the dtype in nested arguments",
        f"model: {{model_args: {{torch_dtype: auto}}}}\noptimizer: {ADAMW}",
        "precision_policy.dtype_key=model_args.torch_dtype",
        "model.model_args.torch_dtype",
    ),
    (
        "everything flat, no nodes",
        "model_name: gpt2\ntorch_dtype: auto\noptim: adamw_torch\nlr: 1e-5",
        "precision_policy.model=. precision_policy.optimizer=optim",
        "torch_dtype",
    ),
    (
        "a list of models",
        f"models: [{{name: a, torch_dtype: auto}}, {{name: b}}]\noptimizer: {ADAMW}",
        "precision_policy.model=models.0",
        "models.0.torch_dtype",
    ),
    (
        "a LoRA rank somewhere",
        f"model: {LOAD}\noptimizer: {ADAMW}\ntrain: {{lora_rank: 0}}",
        "precision_policy.peft=train.lora_rank",
        "model.torch_dtype",
    ),
    (
        "several models",
        f"actor: {LOAD}\ncritic: {LOAD}\nteacher: {LOAD}\nopt: {{actor: {ADAMW}, critic: {ADAMW}}}",
        "'precision_policy.pairs={actor:{model:actor,optimizer:opt.actor},critic:{model:critic,optimizer:opt.critic}}'",
        None,
    ),
]


@pytest.mark.parametrize(("layout", "config", "line", "key"), README_TABLE, ids=[row[0] for row in README_TABLE])
def test_readme_line(compose, layout, config, line, key):
    """The line does what the README says of it."""
    cfg = compose(config, "+precision_policy=on", *line.replace("'", "").split())
    if key is None:
        assert {name: one.rule for name, one in cfg.precision_policy.decision.items()} == {"actor": "set", "critic": "set"}
        assert (cfg.actor.torch_dtype, cfg.critic.torch_dtype, "torch_dtype" in cfg.teacher) == ("float32", "float32", False)
    else:
        assert cfg.precision_policy.decision.key == key
        assert OmegaConf.select(cfg, key) == cfg.precision_policy.storage_dtype


def test_the_readme_has_these_lines():
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    for layout, _, line, key in README_TABLE:
        keys = [key] if key else ["actor.torch_dtype", "critic.torch_dtype"]
        shown = ", ".join(f"`{one}`" for one in keys)
        assert f"| {layout} | `{('+precision_policy=on ' + line).strip()}` | {shown} |" in readme


def test_the_readme_has_every_setting():
    """Its table is made of the settings' own words."""
    from precision_policy.composition.settings import TABLE

    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    for one in TABLE:
        assert f"| `{one.name}` | {one.metadata['shown']} | {one.metadata['meaning']} |" in readme


def rule(compose, optimizer, *overrides):
    return compose(f"model: {{torch_dtype: auto}}\n{optimizer}", "+precision_policy=on", *overrides).precision_policy.decision


@pytest.mark.parametrize(
    "place",
    [
        "training.optimizer",
        "method.optimizer",
        "model.optimizer",
        "lightning_module.optimizer_partial",
        "trainer.optim.optimizer",
    ],
)
def test_placings_of_the_optimizer(compose, place):
    """Every placing that the survey lists, from the command line and from the application's own config."""
    cfg = OmegaConf.create({"model": {"torch_dtype": "auto"}})
    OmegaConf.update(cfg, place, {"_target_": "torch.optim.AdamW"}, force_add=True)
    text = OmegaConf.to_yaml(cfg)
    assert compose(text, "+precision_policy=on", f"precision_policy.optimizer={place}").model.torch_dtype == "float32"
    text += f"precision_policy: {{optimizer: {place}}}\n"
    assert compose(text, "+precision_policy=on").model.torch_dtype == "float32"


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("optimizer: {_target_: torch.optim.AdamW, _partial_: true}", "set"),
        ("optimizer: {_target_: torch.optim.adamw.AdamW}", "set"),
        ("cls: torch.optim.Adam\noptimizer: {_target_: '${cls}'}", "set"),
        ("base: {_target_: torch.optim.Adam}\noptimizer: ${base}", "set"),
        ("optimizer: {_target_: hydra.utils.get_class, path: torch.optim.AdamW}", "set"),
        ("optimizer: {_target_: hydra.utils.get_method, path: torch.optim.AdamW}", "set"),
        ("optimizer: {_target_: hydra.utils.get_class, path: some.Other}", "not_torch_optim"),
        ("optimizer: {_target_: hydra_zen.funcs.zen_processing, _zen_target: torch.optim.adamw.AdamW}", "set"),
        ("optimizer: {_target_: hydra_zen.funcs.zen_processing, _zen_target: bitsandbytes.optim.AdamW}", "not_torch_optim"),
        (
            "optimizer: {_target_: torch.distributed.optim.ZeroRedundancyOptimizer, optimizer_class: torch.optim.AdamW}",
            "set",
        ),
        (
            "optimizer: {_target_: torch.distributed.optim.ZeroRedundancyOptimizer,"
            " optimizer_class: {_target_: hydra.utils.get_class, path: torch.optim.Adam}}",
            "set",
        ),
        ("optimizer: AdamW", "set"),
        ("optimizer: adamw", "set"),
        ("optimizer: torch.optim.AdamW", "set"),
        ("optimizer: adamw_torch", "set"),
        ("optimizer: {name: adamw, lr: 1}", "set"),
        ("optimizer: {name: lion, lr: 1}", "not_torch_optim"),
        ("optimizer: paged_adamw_8bit", "not_torch_optim"),
        ("optimizer: [{_target_: torch.optim.AdamW}, {_target_: bitsandbytes.optim.AdamW}]", "set"),
        ("optimizer: {a: {_target_: some.Other}, b: {_target_: torch.optim.SGD}}", "set"),
        ("optimizer: {a: {_target_: some.Other}, b: {_target_: torch.optim.lr_scheduler.StepLR}}", "not_torch_optim"),
        ("optimizer: {lr: 1.0, betas: [0.9, 0.95]}", "not_torch_optim"),
        ("optimizer: [1, 2]", "no_optimizer"),
        ("optimizer: 3", "no_optimizer"),
    ],
)
def test_optimizers(compose, optimizer, expected):
    assert rule(compose, optimizer).rule == expected


def test_a_guess_is_said_to_be_one(compose):
    assert 'a guess from the name "adamw"' in rule(compose, "optimizer: adamw").reason


@pytest.mark.parametrize(
    ("peft", "off"),
    [
        ("", True),
        ("peft: null", True),
        ("peft: false", True),
        ("peft: 0", True),
        ("peft: ''", True),
        ("peft: none", True),
        ("peft: {}", True),
        ("peft: {_target_: null, r: 8}", True),
        ("peft: {enabled: false, r: 8}", True),
        ("peft: {r: 0}", True),
        ("peft: {rank: 0}", True),
        ("peft: {lora_rank: 0}", True),
        ("use_peft: false\npeft: {_target_: peft.LoraConfig, r: 8}", True),
        ("flag: false\npeft: {enabled: '${flag}', r: 8}", True),
        ("peft: true", False),
        ("peft: 16", False),
        ("peft: lora", False),
        ("peft: {_target_: peft.LoraConfig}", False),
        ("peft: {r: 8}", False),
        ("peft: {enabled: true}", False),
        ("peft: [q_proj]", False),
        ("peft: '???'", False),
        ("peft: '${nowhere}'", False),
    ],
)
def test_peft(compose, peft, off):
    decision = rule(compose, f"optimizer: {ADAMW}\n{peft}")
    assert decision.rule == ("set" if off else "peft")


def test_candidates_are_named(compose):
    """When the default paths lead nowhere, the reason has the lines to paste, both at once where both are missing."""
    reason = compose(f"net: {LOAD}\ntrain: {{opt: {ADAMW}}}", "+precision_policy=on").precision_policy.decision.reason
    assert reason.endswith("; to decide about it, add: precision_policy.model=net precision_policy.optimizer=train.opt")
    reason = compose(f"model: {LOAD}\ntrain: {{opt: {ADAMW}}}", "+precision_policy=on").precision_policy.decision.reason
    assert reason.endswith("; to decide about it, add: precision_policy.optimizer=train.opt")


def test_candidates_are_no_compute_dtypes(compose):
    """A ``dtype`` under a rollout or an amp node is not storage; a wrapped target is an optimizer's all the same."""
    config = "rollout: {dtype: bfloat16}\ntrainer: {amp: {dtype: bf16}}\nactor: {dtype: null}\n" + (
        "opt: {_target_: hydra_zen.funcs.zen_processing, _zen_target: torch.optim.AdamW}"
    )
    reason = compose(config, "+precision_policy=on").precision_policy.decision.reason
    assert reason.endswith("add: precision_policy.model=actor precision_policy.optimizer=opt")
    flat = compose("torch_dtype: auto\noptim: adamw", "+precision_policy=on").precision_policy.decision.reason
    assert reason.endswith("add: precision_policy.model=actor precision_policy.optimizer=opt")
    assert flat.endswith("add: precision_policy.model=. precision_policy.optimizer=optim")


@pytest.mark.parametrize(
    ("rest", "other_outcome"),
    [
        ("peft: true", "precision_policy.peft=null"),
        ("optimizer: {_target_: bitsandbytes.optim.AdamW}", "model.torch_dtype=float32"),
        ("optimizer: {lr: 1.0}", "model.torch_dtype=float32"),
        ("", "model.torch_dtype=float32"),
        ("optimizer: {_target_: torch.optim.AdamW}", "model.torch_dtype=bfloat16"),
    ],
)
def test_every_reason_names_the_other_outcome(compose, rest, other_outcome):
    """What to set to get it, as the command line spells it."""
    cfg = compose(f"model: {{torch_dtype: auto}}\n{rest}", "+precision_policy=on")
    assert f": {other_outcome})" in cfg.precision_policy.decision.reason


def test_the_fix_where_no_key_is_known(app):
    """The warning names no override that nothing would read."""
    run = app("lr: 1")("+precision_policy=on")
    assert "WARNING precision_policy=on: torch.optim.AdamW over bf16 weights" in run.log
    assert "fix: store the model in fp32 where the code makes it" in run.out
    run = app("model: {torch_dtype: bfloat16}", folder="built_in_code")("+precision_policy=on")
    assert "fix: model.torch_dtype=float32" in run.out


@pytest.mark.parametrize(
    ("config", "line", "key"),
    [
        ("_target_: no.such.Model.from_pretrained", "precision_policy.model=.", "torch_dtype"),
        (
            "model: {args: {_target_: no.such.Model.from_pretrained}}",
            "precision_policy.dtype_key=args.torch_dtype",
            "model.args.torch_dtype",
        ),
        (
            "model: {args: {_target_: builtins.dict}}",
            "precision_policy.dtype_key=args.policy_dtype",
            None,
        ),
    ],
)
def test_where_an_absent_key_is_added(compose, config, line, key):
    """At the root and below the model node too, the key stands beside the target that takes it."""
    cfg = compose(f"{config}\noptimizer: {ADAMW}", "+precision_policy=on", *line.split())
    if "_target_" in cfg:  # the record is not in what the application instantiates
        assert "precision_policy" not in cfg
    else:
        assert cfg.precision_policy.decision.key == key
    assert key is None or OmegaConf.select(cfg, key) == "float32"


# Modelled on what the survey found: whole trees, a line, and the outcome.
TREES = {
    "Lightning template": (
        "model: {_target_: src.Module, optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.001},"
        " scheduler: {_target_: torch.optim.lr_scheduler.ReduceLROnPlateau, _partial_: true}, net: {_target_: torch.nn.Linear}}\n"
        "trainer: {_target_: lightning.Trainer, precision: 32}",
        "",
        "no_optimizer",
    ),
    "PPO with reference and reward models": (
        "actor_rollout_ref: {model: {path: /m, enable_gradient_checkpointing: true}, actor: {optim: {lr: 1e-6},"
        " fsdp_config: {dtype: bfloat16}}, rollout: {dtype: bfloat16}}\ncritic: {model: {path: /m}, optim: {lr: 1e-5}}",
        "precision_policy.model=actor_rollout_ref.model precision_policy.optimizer=actor_rollout_ref.actor.optim",
        "not_torch_optim",
    ),
    "training arguments": (
        "model: {model_name_or_path: m, dtype: auto}\ntraining: {_target_: transformers.TrainingArguments, optim: adamw_torch_fused}",
        "precision_policy.optimizer=training.optim",
        "set",
    ),
    "world model with three optimizers": (
        f"world: {{torch_dtype: null}}\nopt: {{world: {ADAMW}, actor: {ADAMW}, critic: {{_target_: some.Lamb}}}}",
        "precision_policy.model=world precision_policy.optimizer=opt",
        "set",
    ),
    "precision of the project's own": (
        f"policy: {{precision: null, backbone: x}}\noptim: {{optimizer: {ADAMW}, scheduler: {{_target_: torch.optim.lr_scheduler.StepLR}}}}",
        "precision_policy.model=policy precision_policy.optimizer=optim.optimizer precision_policy.dtype_key=precision"
        " precision_policy.storage_dtype=32-true",
        "set",
    ),
    "a PEFT block that is off": (
        f"model: {LOAD}\noptimizer: {ADAMW}\nmethod: {{use_peft: false, peft: {{_target_: peft.LoraConfig, r: 16}}}}",
        "precision_policy.peft=method.peft",
        "set",
    ),
    "frozen parameters": (
        f"model: {LOAD}\noptimizer: {ADAMW}\ntrain: {{freeze: [embed, 'layers.0']}}",
        "precision_policy.peft=train.freeze",
        "peft",
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_whole_trees(compose, name):
    config, line, expected = TREES[name]
    assert compose(config, "+precision_policy=on", *line.split()).precision_policy.decision.rule == expected


def test_objects_from_resolvers_are_explicit(compose):
    import torch

    OmegaConf.register_new_resolver("a_dtype", lambda name: getattr(torch, name), replace=True)
    OmegaConf.register_new_resolver("raises", lambda: 1 / 0, replace=True)
    config = f"model: {{torch_dtype: '${{a_dtype:bfloat16}}'}}\nother: '${{raises:}}'\noptimizer: {ADAMW}"
    cfg = compose(config, "+precision_policy=on")
    assert cfg.precision_policy.decision.rule == "explicit_dtype"
    assert cfg.model.torch_dtype is torch.bfloat16


def test_pairs_from_the_applications_config(compose):
    """Each pair by itself: one set, one chosen, one under PEFT; what a pair leaves out is the default's."""
    config = (
        "g: {torch_dtype: auto}\nd: {torch_dtype: bfloat16}\ne: {torch_dtype: auto}\nlora: {r: 8}\n"
        f"optimizer: {ADAMW}\nprecision_policy: {{pairs: {{g: {{model: g}}, d: {{model: d}}, e: {{model: e, peft: lora}}}}}}"
    )
    cfg = compose(config, "+precision_policy=on")
    assert {name: one.rule for name, one in cfg.precision_policy.decision.items()} == {
        "g": "set",
        "d": "explicit_dtype",
        "e": "peft",
    }
    assert (cfg.g.torch_dtype, cfg.e.torch_dtype) == ("float32", "auto")


def test_pairs_in_a_job(app):
    """One log line per pair, and a warning whose fix names their keys."""
    config = "a: {torch_dtype: bfloat16}\nb: {torch_dtype: auto}\noptimizer: {_target_: torch.optim.AdamW, _partial_: true}\n"
    run = app(config)("+precision_policy=on", "precision_policy.pairs={a:{model:a},b:{model:b}}")
    assert run.log.count("INFO") == 2
    assert "fix: a.torch_dtype=float32 b.torch_dtype=float32" in run.out


def test_the_model_behind_an_interpolation(compose):
    """The key is written where the node really lives, and the decision names that place."""
    cfg = compose(f"zoo: {{small: {{torch_dtype: auto}}}}\nmodel: ${{zoo.small}}\noptimizer: {ADAMW}", "+precision_policy=on")
    assert cfg.precision_policy.decision.key == "zoo.small.torch_dtype"
    assert cfg.model.torch_dtype == "float32"
