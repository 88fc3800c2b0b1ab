"""Which dtype key of the model is written: one that is there, or one that is known to be read."""

import pytest
from conftest import ADAMW, AUTO
from omegaconf import OmegaConf


def written(compose, model, *overrides):
    """The keys of the model's node that differ with the policy."""
    config = f"model: {model}\n{ADAMW}"
    before, after = compose(config).model, compose(config, "+precision_policy=on", *overrides).model
    return {key for key in after if key not in before or after[key] != before[key]}


# Every way to hold a dtype, and the key that is written.
@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("{torch_dtype: auto}", "torch_dtype"),
        ("{dtype: null}", "dtype"),
        ("{torch_dtype: null, dtype: auto}", "dtype"),
        ("{_target_: some.made.up.Net, dtype: null}", "dtype"),
        ("{name: gpt2}", None),
        ("{_target_: transformers.AutoModelForCausalLM.from_pretrained}", "torch_dtype"),
        ("{_target_: transformers.AutoModel.from_config}", "torch_dtype"),
        ("{_target_: transformers.models.llama.modeling_llama.LlamaForCausalLM.from_pretrained}", "torch_dtype"),
        ("{_target_: diffusers.UNet2DConditionModel.from_pretrained}", "torch_dtype"),
        ("{_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained}", "torch_dtype"),
        ("{_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_config}", "torch_dtype"),
        ("{_target_: hydra_zen.funcs.zen_processing, _zen_target: transformers.AutoModel.from_pretrained}", "torch_dtype"),
        ("{_target_: diffusers.UNet2DConditionModel.from_config}", None),
        ("{_target_: transformers.AutoModelForCausalLM}", None),
        ("{_target_: transformers.from_pretrained}", None),
        ("{_target_: my_transformers.AutoModel.from_pretrained}", None),
        ("{_target_: zoo.Hub.from_pretrained}", None),
        ("{_target_: timm.create_model}", None),
        ("{_target_: torchvision.models.resnet18}", None),
        ("{_target_: unittest.mock.Mock}", None),
    ],
)
def test_which_key_is_written(compose, model, key):
    """A key that is there stays the key; one is added only where it is known to be read."""
    assert written(compose, model) == ({key} if key else set())


def test_a_key_that_the_user_names_is_added(compose, decide):
    assert written(compose, "{_target_: zoo.Net}", "precision_policy.dtype_key=storage") == {"storage"}
    decision = decide(f"model: {{path: x}}\n{ADAMW}", "precision_policy.dtype_key=torch_dtype")
    assert (decision.rule, decision.key, decision.added, decision.fix) == (
        "set",
        "model.torch_dtype",
        True,
        "+model.torch_dtype=float32",
    )


@pytest.mark.parametrize(
    ("config", "line", "key"),
    [
        ("_target_: transformers.AutoModel.from_pretrained", "precision_policy.model=.", "torch_dtype"),
        (
            "model: {args: {_target_: transformers.AutoModel.from_pretrained}}",
            "precision_policy.dtype_key=args.torch_dtype",
            "model.args.torch_dtype",
        ),
        ("model: {args: {size: 1}}", "precision_policy.dtype_key=args.storage", "model.args.storage"),
    ],
)
def test_a_key_is_added_beside_the_target_that_reads_it(compose, config, line, key):
    """At the root and below the model's node too."""
    cfg = compose(f"{config}\n{ADAMW}", "+precision_policy=on", *line.split())
    assert OmegaConf.select(cfg, key) == "float32"


@pytest.mark.parametrize("key", ["dtype: null", "dtype: auto", "size: 1"])
@pytest.mark.parametrize("setting", [[], ["precision_policy.dtype_key=dtype"]])
def test_a_target_of_torch_takes_no_name(compose, decide, key, setting):
    """``torch.nn.Linear(dtype="float32")`` raises."""
    config = f"model: {{_target_: torch.nn.Linear, {key}}}\n{ADAMW}"
    decision = decide(config, *setting)
    assert decision.rule == "no_dtype_key"
    assert "torch.nn.Linear takes a torch.dtype" in decision.reason
    assert compose(config, "+precision_policy=on", *setting) == compose(config)


@pytest.mark.parametrize(
    ("name", "more", "value", "said"),
    [
        ("text", [], {"torch_dtype": "float32"}, "keeps no fp32 master copy"),
        ("enum", [], {"torch_dtype": None}, "model.torch_dtype is typed as Storage"),
        ("bits", [], {"torch_dtype": None}, "model.torch_dtype is typed as int, which float32 is not"),
        ("bits", ["precision_policy.storage_dtype=32"], {"torch_dtype": 32}, "keeps no fp32 master copy"),
        ("bare", [], {"size": 1}, "model is typed as Bare, which has no dtype or torch_dtype"),
    ],
)
def test_typed_nodes(application, name, more, value, said):
    """A field takes what its type says; where there is none, the node is left alone."""
    run = application("typed_fields")("--config-name", name, "+precision_policy=on", *more)
    assert run.config["model"] == value
    assert said in run.record["decision"]["reason"]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("zoo.passes_on", "torch.float32"),
        ("zoo.Hub.from_pretrained", "torch.float32"),
        ("zoo.Hub.from_config", "torch.float32"),
        ("zoo.wants_objects", "torch.float32"),
        ("zoo.has_names_of_its_own", "torch.float32"),
    ],
)
def test_models_of_other_people_are_left_alone(application, target, dtype):
    """Nothing is added, whatever their names and signatures seem to promise: each of these would die of it."""
    assert f"STORED {dtype}" in application("others_zoo")("+precision_policy=on", f"model._target_={target}").out


def test_an_interpolation_that_names_no_dtype(compose, decide):
    """It is replaced at this node only, and the decision says where it pointed."""
    config = f"dtype: auto\nmodel: {{torch_dtype: '${{dtype}}'}}\n{ADAMW}"
    cfg = compose(config, "+precision_policy=on")
    assert (cfg.dtype, cfg.model.torch_dtype) == ("auto", "float32")
    assert "pointed at dtype" in decide(config).reason


def test_a_missing_dtype_is_left_for_hydra_to_ask_for(compose):
    cfg = compose("model: {torch_dtype: '???'}\n" + ADAMW, "+precision_policy=on")
    assert OmegaConf.is_missing(cfg.model, "torch_dtype")


def test_an_object_from_a_resolver_is_a_choice(compose, decide):
    import torch

    OmegaConf.register_new_resolver("a_dtype", lambda name: getattr(torch, name), replace=True)
    OmegaConf.register_new_resolver("raises", lambda: 1 / 0, replace=True)
    config = f"model: {{torch_dtype: '${{a_dtype:bfloat16}}'}}\nother: '${{raises:}}'\n{ADAMW}"
    assert decide(config).rule == "explicit_dtype"
    assert compose(config, "+precision_policy=on").model.torch_dtype is torch.bfloat16


def test_the_model_behind_an_interpolation(compose, decide):
    """The key is written where the node really lives, and the decision names that place."""
    config = f"zoo: {{small: {{torch_dtype: auto}}}}\nmodel: ${{zoo.small}}\n{ADAMW}"
    assert decide(config).key == "zoo.small.torch_dtype"
    assert compose(config, "+precision_policy=on").model.torch_dtype == "float32"


@pytest.mark.parametrize("override", ["precision_policy.storage_dtype=fp32", "precision_policy.storage_dtype=torch.float32"])
def test_storage_dtype_in_the_projects_words(compose, override):
    """What is written is what was asked for, letter by letter."""
    cfg = compose(AUTO + ADAMW, "+precision_policy=on", override)
    assert cfg.model.torch_dtype == override.partition("=")[2]
