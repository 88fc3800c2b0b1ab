"""The table: which rule holds, in which order, and what its reason says."""

import pytest
from conftest import ADAMW, AUTO


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (ADAMW, "no_model"),
        ("model: gpt2\n" + ADAMW, "no_model"),
        ("model: null\n" + ADAMW, "no_model"),
        (AUTO + ADAMW + "peft: {r: 8}", "peft"),
        ("model: {torch_dtype: auto, load_in_4bit: true}\n" + ADAMW, "quantized"),
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
        ("model: {}\n" + ADAMW, "no_dtype_key"),
        ("model: {_target_: torch.nn.Linear, in_features: 1}\n" + ADAMW, "no_dtype_key"),
        ("model: {_target_: no.such.thing}\n" + ADAMW, "no_dtype_key"),
        ("model: {_target_: '???'}\n" + ADAMW, "no_dtype_key"),
        ("model: {_target_: '${nowhere}'}\n" + ADAMW, "no_dtype_key"),
        (AUTO + ADAMW, "set"),
        ("model: {torch_dtype: null}\n" + ADAMW, "set"),
        ("model: {dtype: auto}\n" + ADAMW, "set"),
        ("model: {_target_: transformers.AutoModelForCausalLM.from_pretrained}\n" + ADAMW, "set"),
        (AUTO + "optimizer: {_target_: torch.optim.sgd.SGD}", "set"),
    ],
)
def test_rule(decide, config, rule):
    """The first rule of the table that holds is the one recorded."""
    assert decide(config).rule == rule


def test_the_order_of_the_rules(decide):
    """Each rule comes before those below it, though theirs hold too."""
    parts = {
        "peft": "lora: {r: 8}\n",
        "quantized": "load_in_8bit: true",
        "no_model": "model: null\n",
        "no_optimizer": "optimizer: null\n",
        "not_torch_optim": "optimizer: {_target_: lion.Lion}\n",
        "explicit_dtype": "torch_dtype: bfloat16",
    }
    quantized = f"model: {{{parts['quantized']}, {parts['explicit_dtype']}}}\n"
    explicit = f"model: {{{parts['explicit_dtype']}}}\n"
    assert decide(parts["peft"] + quantized).rule == "peft"
    assert decide(parts["peft"]).rule == "peft"
    assert decide(quantized).rule == "quantized"
    assert decide(parts["no_model"] + parts["no_optimizer"]).rule == "no_model"
    assert decide(explicit + parts["no_optimizer"]).rule == "no_optimizer"
    assert decide(explicit + parts["not_torch_optim"]).rule == "not_torch_optim"
    assert (
        decide("model: {torch_dtype: bfloat16, dtype: null}\n" + ADAMW, "precision_policy.write=false").rule == "explicit_dtype"
    )
    assert decide("model: {}\n" + ADAMW, "precision_policy.write=false").rule == "no_dtype_key"
    assert decide(AUTO + ADAMW, "precision_policy.write=false").rule == "warn_only"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ADAMW, "the config has no node `model`; the optimizer that the job builds is watched"),
        (
            AUTO,
            "the config has no optimizer at `optimizer`; the optimizer that the job builds is watched (fp32 storage all the same: model.torch_dtype=float32)",
        ),
        (
            f"model: {{size: 1}}\n{ADAMW}",
            "model has no dtype key, and no target that is known to read one (if it reads one, name the key: "
            "precision_policy.dtype_key=NAME); the optimizer that the job builds is watched",
        ),
        (AUTO + ADAMW, "torch.optim.AdamW keeps no fp32 master copy (keep bf16: model.torch_dtype=bfloat16)"),
        (
            AUTO + "optimizer: lion",
            "lion is no optimizer of torch.optim and may keep an fp32 master copy of its own (fp32 storage all the same: model.torch_dtype=float32)",
        ),
    ],
)
def test_what_is_missing_is_one_plain_clause(decide, config, reason):
    assert decide(config).reason == reason


def test_an_optimizer_that_nobody_watches_is_not_said_to_be_watched(decide):
    for config in (ADAMW, AUTO, AUTO + "optimizer: {lr: 1}", "model: {size: 1}\n" + ADAMW):
        assert "watched" in decide(config).reason
        assert "watched" not in decide(config, "precision_policy.bf16_adam=ignore").reason


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
def test_a_reason_names_the_other_outcome(decide, rest, other_outcome):
    """What to set to get it, as the command line spells it."""
    assert f": {other_outcome})" in decide(f"model: {{torch_dtype: auto}}\n{rest}").reason


@pytest.mark.parametrize(
    ("model", "overrides", "fix"),
    [
        ("{dtype: bfloat16}", [], "model.dtype=float32"),
        ("{dtype: bf16}", [], "model.dtype=fp32"),
        ("{dtype: torch.float16}", [], "model.dtype=torch.float32"),
        ("{precision: bf16-true}", ["precision_policy.dtype_key=precision"], "model.precision=32-true"),
        ("{dtype: bf16}", ["precision_policy.storage_dtype=float32"], "model.dtype=float32"),
        ("{dtype: their_half}", [], "model.dtype=float32"),
        ("{}", ["+model.dtype=bf16"], "+model.dtype=fp32"),
        ("{load_as_bf16: true}", ["precision_policy.dtype_key=load_as_bf16"], "model.load_as_bf16=false"),
        ("{keep_fp32: false}", ["precision_policy.dtype_key=keep_fp32"], "model.keep_fp32=true"),
        ("{cast: true}", ["precision_policy.dtype_key=cast"], ""),
        ("{dtype: {_target_: hydra.utils.get_object, path: torch.bfloat16}}", [], ""),
    ],
)
def test_how_a_chosen_dtype_would_be_fp32(decide, model, overrides, fix):
    """In the project's own words, on this command line; nothing where that is not known."""
    decision = decide(f"model: {model}\n{ADAMW}", *overrides)
    assert (decision.rule, decision.fp32, decision.fix) == ("explicit_dtype", False, fix)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("{dtype: float32}", []),
        ("{dtype: fp32}", []),
        ("{load_as_bf16: false}", ["precision_policy.dtype_key=load_as_bf16"]),
        ("{keep_fp32: true}", ["precision_policy.dtype_key=keep_fp32"]),
    ],
)
def test_a_chosen_fp32_is_known_as_such(decide, model, overrides):
    assert decide(f"model: {model}\n{ADAMW}", *overrides).fp32 is True


def test_kernels_that_take_16_bits_alone_are_named(decide):
    """``mixed`` computes in bf16, so there is nothing to name."""
    config = f"model: {{dtype: auto, attn_implementation: flash_attention_2}}\n{ADAMW}"
    assert "model.attn_implementation=flash_attention_2 takes 16 bits alone" in decide(config).reason
    assert "16 bits" not in decide(config, "precision_policy.compute_dtype=bfloat16").reason


def test_what_is_left_to_a_frozen_base_is_not_computed_in_bf16(decide):
    for rest in ("lora: {r: 8}", "model: {load_in_8bit: true}"):
        assert "no bf16 compute is supplied" in decide(rest, "precision_policy.compute_dtype=bfloat16").reason
