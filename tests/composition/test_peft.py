"""Whether PEFT is on: by the names that projects use, for the trained model, with all that switches it off."""

from pathlib import Path

import pytest
import yaml
from conftest import ADAMW, AUTO
from omegaconf import OmegaConf

from precision_policy.composition import peft

# Where PEFT is on somewhere in a config, and the path that is named for it.
ON = [
    ("lora: {r: 8}", "lora"),
    ("LoRA: {r: 8}", "LoRA"),
    ("Peft_Config: {R: 8}", "Peft_Config"),
    ("method: {peft_config: {_target_: peft.LoraConfig}}", "method.peft_config"),
    ("trainer: {peft_config: {r: 8}}", "trainer.peft_config"),
    ("train_model: {lora: {enabled: true}}", "train_model.lora"),
    ("use_lora: true", "use_lora"),
    ("train: {use_peft: true}", "train.use_peft"),
    ("train: {lora_rank: 16}", "train.lora_rank"),
    ("train: {lora_r: 16}", "train.lora_r"),
    ("train: {finetuning_type: LoRA}", "train.finetuning_type"),
    ("adapters: [{_target_: peft.LoraConfig, r: 4}]", "adapters.0._target_"),
    ("train: [{lora: {r: 8}}]", "train.0.lora"),
    ("train: {qlora: true}", "train.qlora"),
    ("peft: '???'", "peft"),
    ("train: {peft_scheme: lora}", "train.peft_scheme"),
    ("actor_rollout_ref: {model: {lora_rank: 8}}", "actor_rollout_ref.model.lora_rank"),
    ("reference_data: {x: 1}\npreference: {lora: {r: 2}}", "preference.lora"),
]

# Full fine-tunes that look a little like PEFT.
OFF = [
    "enable_hf_state_dict_adapter: true",
    "train: {use_peft: false, lora_dropout: 0.1, lora_rank: 8}",
    "train: {use_peft: false, lora: {r: 8}}",
    "train: {Use_PEFT: false, LoRA: {r: 8}}",
    "use_lora: false\nlora: {r: 8, alpha: 16}",
    "train: {target_modules: [q_proj]}",
    "resume: outputs/lora/checkpoint-100",
    "train: {finetuning_type: full}",
    "peft: {enabled: false, lora: {r: 8}}",
    "peft: {_target_: null, lora: {r: 8}}",
    "peft_scheme: none",
    "train: {lora_rank: 0}",
    "LoRA: {R: 0}",
    "lora: {}",
    "peft: []",
    "adapter: {_target_: my.Adapter}",
    "explore: {lorapath: x}",
]

# Blocks of models that are not trained, or not by this optimizer.
OTHER_ROLES = [
    "ref: {lora: {r: 8}}",
    "ref_model: {lora: {enabled: true, r: 8}}",
    "reference: {peft: {r: 8}}",
    "policy: {reference: {lora_rank: 8}}",
    "reward_model: {use_lora: true}",
    "RM: {lora: {r: 8}}",
    "teacher: {adapter: lora}",
    "my_critic: {lora: {r: 8}}",
    "judge: {model: {lora: {r: 8}}}",
    "rollout: {lora_rank: 16}",
    "vllm: {enable_lora: true}",
    "sglang: {enable_lora: true}",
    "inference_engine: {lora: {r: 8}}",
]


@pytest.mark.parametrize(("tree", "where"), ON)
def test_it_is_found(decide, tree, where):
    """Nothing is set, and the reason names the path and how to say that it is not about this model."""
    decision = decide(f"{AUTO}{ADAMW}{tree}")
    assert decision.rule == "peft"
    assert f"({where}" in decision.reason
    assert decision.reason.endswith("(not about this model: precision_policy.peft=null)")
    assert decide(f"{AUTO}{ADAMW}{tree}", "precision_policy.peft=null").rule == "set"


@pytest.mark.parametrize("tree", OFF)
def test_a_full_fine_tune_is_not_mistaken_for_it(decide, tree):
    assert decide(f"{AUTO}{ADAMW}{tree}").rule == "set"


@pytest.mark.parametrize("tree", OTHER_ROLES)
def test_a_model_of_another_role_says_nothing(decide, tree):
    assert decide(f"{AUTO}{ADAMW}{tree}").rule == "set"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("critic: {dtype: auto, lora: {r: 8}}", "precision_policy.model=critic"),
        ("critic: {net: {dtype: auto}, lora: {r: 8}}", "precision_policy.model=critic.net"),
        ("zoo: {reward: {dtype: auto, lora: {r: 8}}}\nmodel: ${zoo.reward}", ""),
    ],
)
def test_unless_that_model_is_the_trained_one(decide, config, line):
    """Its node is, or holds, the one that is decided about, also behind an interpolation."""
    assert decide(f"{config}\n{ADAMW}", *line.split()).rule == "peft"


def test_the_critic_of_a_pair_is_trained(record):
    """Of two pairs, the block below the critic is about the critic alone."""
    config = f"actor: {{dtype: auto}}\ncritic: {{dtype: auto, lora: {{r: 8}}}}\n{ADAMW}"
    pairs = "precision_policy.pairs={a:{model:actor},c:{model:critic}}"
    decisions = record(config, "+precision_policy=on", pairs).decision
    assert (decisions.a.rule, decisions.c.rule) == ("set", "peft")


@pytest.mark.parametrize("more", [[], ["precision_policy.model=zoo.backbone"]])
def test_a_run_gets_one_verdict_whether_or_not_its_model_is_found(application, more):
    """``strict`` lets bf16 adapters train, wherever their block and the model stand."""
    run = application("adapters_elsewhere")("+precision_policy=strict", *more)
    assert "TRAINED" in run.out
    assert run.log.startswith("INFO precision_policy=strict: nothing set (peft): PEFT is on (recipe.LoRA is there)")


@pytest.mark.parametrize(
    ("block", "is_on"),
    [
        ("", False),
        ("flag: null", False),
        ("flag: false", False),
        ("flag: 0", False),
        ("flag: ''", False),
        ("flag: ' None '", False),
        ("flag: {}", False),
        ("flag: []", False),
        ("flag: {_target_: null, r: 8}", False),
        ("flag: {enabled: false, r: 8}", False),
        ("flag: {enable: false, r: 8}", False),
        ("flag: {use_flag: false, r: 8}", False),
        ("flag: {r: 0}", False),
        ("flag: {rank: 0}", False),
        ("flag: {lora_rank: 0}", False),
        ("use_flag: false\nflag: {_target_: peft.LoraConfig, r: 8}", False),
        ("switch: false\nflag: {enabled: '${switch}', r: 8}", False),
        ("flag: true", True),
        ("flag: 16", True),
        ("flag: ' LoRA '", True),
        ("flag: {_target_: peft.LoraConfig}", True),
        ("flag: {r: 8}", True),
        ("flag: {enabled: true}", True),
        ("flag: [q_proj]", True),
        ("flag: '???'", True),
        ("flag: '${nowhere}'", True),
    ],
)
def test_at_a_path(block, is_on):
    assert (peft.on_at(OmegaConf.create(block), "flag") is not None) is is_on


def test_at_an_index():
    cfg = OmegaConf.create({"tuners": [{"r": 8}, None]})
    assert peft.on_at(cfg, "tuners.0") == "tuners.0 is there"
    assert peft.on_at(cfg, "tuners.1") is None


def test_hydras_own_node_is_not_looked_at_and_hides_nothing_after_it():
    cfg = OmegaConf.create({"hydra": {"lora": {"r": 4}}, "precision_policy": {"peft": "x"}, "adapters": {"lora": {"r": 8}}})
    assert peft.on_anywhere(cfg) == "adapters.lora is there"


@pytest.mark.parametrize(
    "model",
    [
        "load_in_4bit: true",
        "Load_In_8bit: true",
        "quantization_config: {_target_: transformers.BitsAndBytesConfig}",
        "model_kwargs: {load_in_4bit: true}",
        "bnb_config: {load_in_4bit: true}",
        "quantization: int8",
    ],
)
def test_quantized(decide, model):
    decision = decide(f"model: {{torch_dtype: auto, {model}}}\n{ADAMW}")
    assert decision.rule == "quantized"
    assert model.split(":")[0] in decision.reason


@pytest.mark.parametrize(
    "model", ["load_in_4bit: false", "quantization_config: null", "quantization: none", "quantization: {}"]
)
def test_not_quantized(decide, model):
    assert decide(f"model: {{torch_dtype: auto, {model}}}\n{ADAMW}").rule == "set"


def survey():
    return yaml.safe_load((Path(__file__).parent / "survey.yaml").read_text())


@pytest.mark.parametrize("layout", survey(), ids=lambda layout: layout["what"])
def test_survey(decide, layout):
    """Layouts of public repositories: no full fine-tune is taken for PEFT, and no PEFT run missed."""
    text = OmegaConf.to_yaml(OmegaConf.create(layout["config"]))
    assert (decide(text, *layout.get("line", "").split()).rule in ("peft", "quantized")) is layout["peft"]
