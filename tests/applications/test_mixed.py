"""``mixed`` in applications that know nothing of it, each run as its users do."""

import re
import sys

import pytest
from words import STORED, SUPPLIED, UNSEEN, trained

pytestmark = pytest.mark.once
MIXED = "+precision_policy=mixed"
COMPUTED = f"{STORED}, computed in bf16 by {SUPPLIED}"


@pytest.fixture
def plain_training(application):
    return application("plain_training")


@pytest.mark.parametrize("how", ["plain", "compiled", "functional", "lazy"])
def test_supplied(plain_training, how):
    """Whatever calls the model first; and an exported program is as it would be without the policy."""
    run = plain_training(MIXED, f"how={how}", "exports=true")
    assert run.log.splitlines()[-1].endswith(COMPUTED)
    assert "OUTSIDE torch.float32 ROUNDED True" in run.out
    assert "CALL IS TORCH'S True" in run.out
    assert "EXPORTED AUTOCAST False" in run.out
    if how != "compiled":
        assert "INSIDE ['torch.bfloat16']" in run.out


def test_the_applications_hooks_see_fp32(plain_training):
    run = plain_training(MIXED, "how=hook")
    assert "HOOK float32" in run.out
    assert "HOOK float16" not in run.out
    assert "INSIDE ['torch.bfloat16']" in run.out


@pytest.mark.parametrize(
    ("option", "how", "by"),
    [
        ("mixed", "penalty", SUPPLIED),
        ("mixed", "weight_norm", SUPPLIED),
        ("on", "own_autocast_and_penalty", "the application's autocast"),
    ],
)
def test_nothing_untrue_of_gradients_that_something_is_added_to(plain_training, option, how, by):
    run = plain_training(f"+precision_policy={option}", f"how={how}")
    assert "INSIDE ['torch.bfloat16']" in run.out
    assert f"{STORED}, called under {by}" in run.log.splitlines()[-1]
    assert "WARNING" not in run.log


def test_what_is_not_supplied_is_said(plain_training):
    run = plain_training(MIXED, "how=no_module")
    (text,) = [line for line in run.log.splitlines() if line.startswith("WARNING")]
    assert "compute_dtype=bfloat16 was asked for, and is not supplied: until the first step, no module that owns" in text


def test_fresh_optimizers(plain_training):
    """Over the same model, 600 rounds."""
    run = plain_training(MIXED, "rounds=600")
    assert run.log.count("computed in bf16") == 1
    assert "INSIDE ['torch.bfloat16']" in run.out


@pytest.mark.parametrize("extra", [["model.dtype=bfloat16"], ["+lora={r: 8}"], ["+model.load_in_4bit=true"]])
def test_nothing_is_supplied_to_16_bits_or_peft(application, extra):
    """The code makes an fp32 model all the same."""
    run = application("fp32_all_the_same")(MIXED, *extra)
    assert "ROUNDED False" in run.out
    assert "computed in" not in run.log


def test_several_steps_in_one_call(application):
    """Lightning's DDP calls a whole training step; the losses are those without the policy, to the precision of bf16."""
    inner_steps = application("inner_steps")

    def losses(option):
        return [float(loss) for loss in re.findall(r"LOSS (\S+)", inner_steps(f"+precision_policy={option}").out)]

    mixed, off = losses("mixed"), losses("off")
    assert len(off) == 3
    assert mixed == pytest.approx(off, rel=0.2)
    assert len(set(mixed)) == 3


def test_parts_under_a_precision_of_their_own(application):
    """Between Fabric's parts, products stay in fp32."""
    run = application("fabric_parts")(MIXED)
    assert run.out.count("BETWEEN torch.float32") == 2
    assert f"{STORED}, computed in bf16 by Fabric's bf16-mixed" in run.log.splitlines()[-1]


def test_of_two_models_the_one_with_adapters_is_left_alone(application):
    pairs = "precision_policy.pairs={a:{model:a,peft:null},b:{model:b,peft:lora}}"
    run = application("full_and_adapters")(MIXED, pairs)
    assert "Sequential ROUNDED True\n" in run.out
    assert "Adapted ROUNDED False\n" in run.out
    assert COMPUTED in run.log
    left_alone = "called under no autocast of the policy's, which leaves PEFT and quantized models alone"
    frozen = "4,160 elements frozen, stored in bf16"
    assert run.log.splitlines()[-1].endswith(f"{STORED}, {left_alone}; {frozen}")
    assert "WARNING" not in run.log


FINE_TUNING = ["loop", "accumulation", "trainer", "accelerate", "lightning_automatic", "lightning_by_hand"]


@pytest.fixture
def fine_tuning(application, checkpoint):
    make = application("fine_tuning")
    return lambda *arguments, **kwargs: make(*arguments, f"model.pretrained_model_name_or_path={checkpoint}", **kwargs)


@pytest.mark.parametrize("way", FINE_TUNING)
def test_frameworks(fine_tuning, way):
    """Where they compute in fp32: bf16, supplied; one line."""
    run = fine_tuning(MIXED, f"way={way}")
    assert [line.split()[0] for line in run.log.splitlines()] == ["INFO", "INFO"]
    assert run.log.endswith(trained(21, 492_160, f"computed in bf16 by {SUPPLIED}"))
    if way == "accumulation":
        assert "SAMPLE torch.Size([1, 19])" in run.out


@pytest.mark.parametrize(
    ("way", "by"),
    [
        ("loop", "the application's autocast"),
        ("trainer", "accelerate's mixed precision"),
        ("accelerate", "accelerate's mixed precision"),
        ("lightning_automatic", "the application's autocast"),
        ("lightning_by_hand", "the application's autocast"),
    ],
)
def test_where_it_is_there_already(fine_tuning, way, by):
    """Nothing is added, and the line says who does it."""
    run = fine_tuning(MIXED, f"way={way}", "precision=bf16")
    assert f"{STORED}, computed in bf16 by {by}" in run.log.splitlines()[-1]


def test_in_a_process_that_the_job_starts(fine_tuning):
    assert "INSIDE torch.bfloat16" in fine_tuning(MIXED, "way=spawned", python=sys.executable).out


def test_swept(fine_tuning):
    """Each job of a sweep by itself."""
    run = fine_tuning("--multirun", "+precision_policy=on,mixed,off")
    lines = [line.partition(f"{STORED}, ")[2] for line in run.log.splitlines() if f"{STORED}, " in line]
    assert lines == [UNSEEN, f"computed in bf16 by {SUPPLIED}"]
