"""Where real projects put the model, the optimizer and PEFT; the table in docs/settings.md is made of these lines."""

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

ADAMW = "{_target_: torch.optim.AdamW, lr: 1e-5}"
LOAD = "{_target_: transformers.AutoModel.from_pretrained}"

# Layout in words, config, the user's line after +precision_policy=on, the key that is set.
TABLE = [
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


@pytest.mark.parametrize(("layout", "config", "line", "key"), TABLE, ids=[row[0] for row in TABLE])
def test_line(compose, layout, config, line, key):
    """The line does what docs/settings.md says of it."""
    cfg = compose(config, "+precision_policy=on", *line.replace("'", "").split(), with_hydra=True)
    decision = cfg.hydra.precision_policy.decision
    if key is None:
        assert {name: pair.rule for name, pair in decision.items()} == {"actor": "set", "critic": "set"}
        assert (cfg.actor.torch_dtype, cfg.critic.torch_dtype, "torch_dtype" in cfg.teacher) == ("float32", "float32", False)
    else:
        assert decision.key == key
        assert OmegaConf.select(cfg, key) == "float32"


def test_the_page_of_settings_has_these_lines():
    page = (ROOT / "docs/settings.md").read_text()
    for layout, _, line, key in TABLE:
        keys = [key] if key else ["actor.torch_dtype", "critic.torch_dtype"]
        shown = ", ".join(f"`{name}`" for name in keys)
        assert f"| {layout} | `{('+precision_policy=on ' + line).strip()}` | {shown} |" in page


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
def test_whole_trees(decide, name):
    config, line, expected = TREES[name]
    assert decide(config, *line.split()).rule == expected
