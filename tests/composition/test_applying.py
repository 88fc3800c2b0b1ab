"""What is written into a config, and what is recorded."""

from conftest import ADAMW, AUTO
from omegaconf import OmegaConf

from precision_policy.composition.applying import apply
from precision_policy.record import Record


def test_set_writes_one_key_and_nothing_else(compose, decide):
    config = "model: {torch_dtype: auto, name: x, inner: {dtype: null}}\noptimizer: {_target_: torch.optim.AdamW, lr: '${lr}'}\nlr: 1"
    off, on = (OmegaConf.to_container(compose(config, *extra)) for extra in ([], ["+precision_policy=on"]))
    off["model"]["torch_dtype"] = "float32"
    assert on == off
    assert decide(config) == {
        "rule": "set",
        "key": "model.torch_dtype",
        "before": "auto",
        "after": "float32",
        "reason": "torch.optim.AdamW keeps no fp32 master copy (keep bf16: model.torch_dtype=bfloat16)",
        "fix": "model.torch_dtype=float32",
        "fp32": True,
        "added": False,
        "loads_checkpoint_dtype": True,
    }


def test_off_is_an_explicit_nothing(compose, record):
    """``off`` takes every setting and decides nothing."""
    arguments = ["+precision_policy=off", "precision_policy.model=elsewhere"]
    assert compose(AUTO + ADAMW, *arguments).model.torch_dtype == "auto"
    told = record(AUTO + ADAMW, *arguments)
    assert (told.enabled, told.model, told.decision) == (False, "elsewhere", None)


def test_warn_never_writes(compose):
    """Whatever the spelling of fp32."""
    for spelling in ("float32", "fp32", "32"):
        arguments = ["+precision_policy=warn", f"precision_policy.storage_dtype={spelling}"]
        assert compose(AUTO + ADAMW, *arguments).model.torch_dtype == "auto"


def test_a_saved_decision_stays_while_its_key_has_the_value():
    """Else it is decided anew; so is one that is not whole."""
    cfg = OmegaConf.create(AUTO + ADAMW)
    saved = apply(cfg, {}, [])["decision"]
    assert apply(cfg, {}, [], saved)["decision"] == saved
    assert apply(cfg, {}, [], {"rule": "set"})["decision"]["rule"] == "explicit_dtype"
    cfg.model.torch_dtype = "bfloat16"
    assert apply(cfg, {}, [], saved)["decision"]["rule"] == "explicit_dtype"


def test_a_saved_decision_of_a_pair_stays():
    cfg = OmegaConf.create("a: {dtype: auto}\nb: {dtype: bf16}\n" + ADAMW)
    given = {"pairs": {"first": {"model": "a"}, "second": {"model": "b"}}}
    saved = apply(cfg, given, [])["decision"]
    assert {name: decision["rule"] for name, decision in saved.items()} == {"first": "set", "second": "explicit_dtype"}
    assert apply(cfg, given, [], saved)["decision"] == saved


def test_the_job_reads_what_is_recorded(record):
    """The record is whole, also with several decisions and with none."""
    one = Record.read(OmegaConf.to_container(record(AUTO + ADAMW, "+precision_policy=mixed")))
    assert (one.enabled, one.master_weights, one.compute_dtype, one.bf16_adam) == (True, True, "bfloat16", "warn")
    assert [decision.rule for decision in one.decisions] == ["set"]
    pairs = "precision_policy.pairs={a:{model:model},b:{model:optimizer}}"
    several = Record.read(OmegaConf.to_container(record(AUTO + ADAMW, "+precision_policy=on", pairs)))
    assert [decision.rule for decision in several.decisions] == ["set", "no_dtype_key"]
    assert Record.read(OmegaConf.to_container(record(AUTO, "+precision_policy=off"))).decisions == ()


def test_pairs(record, compose):
    """Each pair by itself: one set, one chosen, one under PEFT; what a pair leaves out is the default's."""
    config = (
        "g: {torch_dtype: auto}\nd: {torch_dtype: bfloat16}\ne: {torch_dtype: auto}\nlora: {r: 8}\n"
        f"{ADAMW}precision_policy: {{pairs: {{g: {{model: g}}, d: {{model: d}}, e: {{model: e, peft: lora}}}}}}"
    )
    decisions = record(config, "+precision_policy=on").decision
    assert {name: decision.rule for name, decision in decisions.items()} == {"g": "set", "d": "explicit_dtype", "e": "peft"}
    cfg = compose(config, "+precision_policy=on")
    assert (cfg.g.torch_dtype, cfg.e.torch_dtype) == ("float32", "auto")
