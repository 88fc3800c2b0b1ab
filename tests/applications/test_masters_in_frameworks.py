"""Master weights in applications of real frameworks: every step is right, and a run that is resumed is the one that was not."""

import re

import pytest
import torch

pytestmark = pytest.mark.once

# How an application's master weights are switched on and off.
WITH = ["arm=false", "+precision_policy=master_weights"]
WITHOUT = ["arm=false"]

OPTIMIZERS = {
    "AdamW": [],
    "fused": ["+optimizer.fused=true", "+optimizer.amsgrad=true"],
    "foreach": ["optimizer._target_=torch.optim.NAdam", "+optimizer.foreach=true"],
    "SGD": ["optimizer._target_=torch.optim.SGD", "optimizer.lr=1e-3", "+optimizer.momentum=0.9", "+optimizer.nesterov=true"],
    "Adafactor": ["optimizer._target_=torch.optim.Adafactor", "optimizer.lr=1e-3"],
    "Muon": ["optimizer._target_=torch.optim.Muon", "optimizer.lr=1e-4"],
}


def steps_and_wrong(run):
    """What the referees of all processes say: steps, and elements that were not those of copies kept by hand."""
    found = re.findall(r"^REFEREE (\d+) steps, (\d+) wrong$", run.out, re.MULTILINE)
    return [(int(steps), int(wrong)) for steps, wrong in found]


def bits(value):
    """A value in a form in which == compares each bit of each tensor."""
    if torch.is_tensor(value):
        whole = value.contiguous()
        return str(whole.dtype), tuple(whole.shape), whole.view(torch.uint8).tolist() if whole.dim() else whole.item()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    return value


def load(app, name="result.pt"):
    return torch.load(app.folder / name, weights_only=True)


def check_kept(result):
    """Each state has low bits, of which most are set over all states, and its other tensors are in fp32."""
    kept = torch.cat([entry["master_low_bits"].flatten() for entry in result["states"].values()])
    assert kept.view(torch.int16).ne(0).double().mean() > 0.5
    for entry in result["states"].values():
        assert entry["master_low_bits"].dtype is torch.bfloat16
        others = [value for name, value in entry.items() if name != "master_low_bits" and torch.is_tensor(value)]
        assert {value.dtype for value in others} <= {torch.float32}


def check_same(one, other):
    assert bits(one["weights"]) == bits(other["weights"])
    assert bits(one["states"]) == bits(other["states"])
    assert bits(one["groups"]) == bits(other["groups"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loop_steps_as_over_copies_kept_by_hand(application, optimizer):
    """With a scheduler, clipping and accumulation, whatever the optimizer."""
    loop = application("master_weights", "loop.py")
    run = loop(*WITH, *OPTIMIZERS[optimizer])
    assert steps_and_wrong(run) == [(6, 0)]
    check_kept(load(loop))


def test_referee_finds_a_run_without(application):
    """Without master weights nearly all weights differ from copies kept by hand, and no state has low bits."""
    loop = application("master_weights", "loop.py")
    ((steps, wrong),) = steps_and_wrong(loop(*WITHOUT))
    assert steps == 6
    assert wrong > 500
    assert "master_low_bits" not in load(loop)["states"][0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loop_resumes_bit_for_bit(application, optimizer):
    loop = application("master_weights", "loop.py")
    chosen = [*WITH, *OPTIMIZERS[optimizer]]
    loop(*chosen, "result=whole.pt")
    loop(*chosen, "steps=3", "save=checkpoint.pt", "result=half.pt")
    run = loop(*chosen, "steps=3", "first=3", "resume=checkpoint.pt", "result=resumed.pt")
    assert steps_and_wrong(run) == [(3, 0)]
    check_same(load(loop, "resumed.pt"), load(loop, "whole.pt"))


def test_checkpoint_made_without_is_resumed_with(application):
    """The states of bf16 become fp32, and go on as copies kept by hand would."""
    loop = application("master_weights", "loop.py")
    loop(*WITHOUT, "steps=3", "save=checkpoint.pt", "result=half.pt")
    assert load(loop, "half.pt")["states"][0]["exp_avg"].dtype is torch.bfloat16
    run = loop(*WITH, "steps=3", "first=3", "resume=checkpoint.pt")
    assert steps_and_wrong(run) == [(3, 0)]
    check_kept(load(loop))


def test_checkpoint_made_with_is_resumed_without(application):
    """torch casts the states to bf16, and its step does not mind the low bits."""
    loop = application("master_weights", "loop.py")
    loop(*WITH, "steps=3", "save=checkpoint.pt")
    checkpoint = load(loop, "checkpoint.pt")
    for entry in checkpoint["optimizer"]["state"].values():
        del entry["master_low_bits"]
    torch.save(checkpoint, loop.folder / "bare.pt")
    loop(*WITHOUT, "steps=3", "first=3", "resume=checkpoint.pt", "result=one.pt")
    loop(*WITHOUT, "steps=3", "first=3", "resume=bare.pt", "result=other.pt")
    one, other = load(loop, "one.pt"), load(loop, "other.pt")
    for entry in one["states"].values():
        del entry["master_low_bits"]
        assert entry["exp_avg"].dtype is torch.bfloat16
    check_same(one, other)


@pytest.mark.parametrize("fused", [[], ["+optimizer.fused=true"]], ids=["one by one", "fused"])
@pytest.mark.parametrize("clip", [[], ["clip=null"]], ids=["clipped", "scaled in the step"])
def test_loss_is_scaled(application, fused, clip):
    """Under GradScaler, which leaves out the step whose gradients overflow; a resumed run is the uninterrupted one."""
    loop = application("master_weights", "loop.py")
    chosen = [*WITH, *fused, *clip, "scaler=true", "overflow_at=2"]
    # A fused optimizer decides by itself: its step is called and does nothing. So does that of the copies.
    called = 6 if fused else 5
    assert steps_and_wrong(loop(*chosen, "result=whole.pt")) == [(called, 0)]
    assert load(loop, "whole.pt")["states"][0]["step"] == 5
    loop(*chosen, "steps=3", "save=checkpoint.pt")
    run = loop(*chosen, "steps=3", "first=3", "resume=checkpoint.pt", "result=resumed.pt")
    assert steps_and_wrong(run) == [(3, 0)]
    check_same(load(loop, "resumed.pt"), load(loop, "whole.pt"))


@pytest.mark.parametrize("what", ["model", "step"])
def test_compiled(application, what):
    """A compiled step is the one that is not, and a compiled model learns by it; a resumed run is the uninterrupted one."""
    loop = application("master_weights", "loop.py")
    chosen = [*WITH, f"compile={what}"]
    assert steps_and_wrong(loop(*chosen, "result=whole.pt")) == [(6, 0)]
    check_kept(load(loop, "whole.pt"))
    loop(*chosen, "steps=3", "save=checkpoint.pt")
    run = loop(*chosen, "steps=3", "first=3", "resume=checkpoint.pt", "result=resumed.pt")
    assert steps_and_wrong(run) == [(3, 0)]
    check_same(load(loop, "resumed.pt"), load(loop, "whole.pt"))
    if what == "step":
        loop(*WITH, "result=plain.pt")
        check_same(load(loop, "whole.pt"), load(loop, "plain.pt"))


def test_compiled_by_inductor(application):
    """The compiler that people use; Dynamo does not look into the step again and again."""
    loop = application("master_weights", "loop.py")
    run = loop(*WITH, "compile=both", "backend=inductor", env={"TORCH_LOGS": "recompiles"}, timeout=600)
    assert steps_and_wrong(run) == [(6, 0)]
    assert "Recompiling" not in run.out + run.err
    check_kept(load(loop))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_trainer_resumes_bit_for_bit(application, optim):
    """The Trainer of transformers, interrupted after three of six steps, by any of torch's optimizers and by its own Adafactor."""
    trainer = application("master_weights", "trainer.py", heavy=True)
    chosen = [*WITH, f"trainer.optim={optim}"]
    assert steps_and_wrong(trainer(*chosen, "result=whole.pt", "+trainer.save_strategy=no")) == [(6, 0)]
    check_kept(load(trainer, "whole.pt"))
    trainer(*chosen, "stop_after=3", "result=half.pt")
    run = trainer(*chosen, "resume=out/trainer/checkpoint-3", "result=resumed.pt")
    assert steps_and_wrong(run) == [(3, 0)]
    check_same(load(trainer, "resumed.pt"), load(trainer, "whole.pt"))


def test_trainer_goes_on_from_a_checkpoint_made_without(application):
    """And without master weights from one that was made with them."""
    trainer = application("master_weights", "trainer.py", heavy=True)
    trainer(*WITHOUT, "stop_after=3", "result=half.pt")
    assert "master_low_bits" not in load(trainer, "half.pt")["states"][0]
    run = trainer(*WITH, "resume=out/trainer/checkpoint-3")
    assert steps_and_wrong(run) == [(3, 0)]
    check_kept(load(trainer))
    trainer(*WITH, "stop_after=3", "trainer.output_dir=out/with")
    run = trainer(*WITHOUT, "resume=out/with/checkpoint-3")
    ((steps, _),) = steps_and_wrong(run)
    assert steps == 3
    assert load(trainer)["states"][0]["exp_avg"].dtype is torch.bfloat16


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_trainer_loads_its_best_model(application, optim):
    """The best weights stay what they are when the optimizer steps on, though it has the low bits of the last ones."""
    from safetensors.torch import load_file

    trainer = application("master_weights", "trainer.py", heavy=True)
    best = ["load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=2", "save_steps=2", "weight_decay=0"]
    worst = ["+trainer.metric_for_best_model=eval_loss", "+trainer.greater_is_better=true"]  # the first one, not the last
    words = [f"++trainer.{word}" for word in best]
    run = trainer(*WITH, *words, *worst, f"trainer.optim={optim}")
    folder = re.search(r"^BEST (.*)$", run.out, re.MULTILINE)[1]
    assert folder.endswith("checkpoint-2")
    expected = load_file(trainer.folder / folder / "model.safetensors")
    after = load(trainer, "after.pt")["weights"]
    for name, weights in expected.items():
        assert bits(after[name]) == bits(weights)
    assert steps_and_wrong(run) == [(2, 0)]


@pytest.mark.parametrize("module", ["Automatic", "Manual"])
def test_lightning_resumes_bit_for_bit(application, module):
    """With bf16-true, by a closure or by hand, from ``ckpt_path`` after the first of two epochs."""
    fit = application("master_weights", "lightning_fit.py", heavy=True)
    chosen = [*WITH, f"module={module}"]
    if module == "Manual":
        chosen += ["trainer.accumulate_grad_batches=1", "trainer.gradient_clip_val=null"]
    steps = {"Automatic": 6, "Manual": 24}[module]
    assert steps_and_wrong(fit(*chosen, "result=whole.pt", "trainer.callbacks=[]")) == [(steps, 0)]
    fit(*chosen, "trainer.max_epochs=1", "result=half.pt")
    run = fit(*chosen, "resume=checkpoints/epoch=0.ckpt".replace("=0", r"\=0"), "result=resumed.pt")
    assert steps_and_wrong(run) == [(steps // 2, 0)]
    for resumed, whole in zip(load(fit, "resumed.pt"), load(fit, "whole.pt"), strict=True):
        check_kept(whole)
        check_same(resumed, whole)


def test_lightning_goes_on_from_a_checkpoint_made_without(application):
    """And without master weights from one that was made with them."""
    fit = application("master_weights", "lightning_fit.py", heavy=True)
    checkpoint = r"resume=checkpoints/epoch\=0.ckpt"
    fit(*WITHOUT, "trainer.max_epochs=1")
    run = fit(*WITH, checkpoint)
    assert steps_and_wrong(run) == [(3, 0)]
    check_kept(load(fit)[0])
    (fit.folder / "checkpoints/epoch=0.ckpt").unlink()
    fit(*WITH, "trainer.max_epochs=1")
    fit(*WITHOUT, checkpoint)
    assert load(fit)[0]["states"][0]["exp_avg"].dtype is torch.bfloat16


@pytest.mark.parametrize("program", ["fabric.py", "accelerated.py"])
def test_fabric_and_accelerate_resume_bit_for_bit(application, program):
    """By ``Fabric.save`` and ``load``, and by ``Accelerator.save_state`` and ``load_state``."""
    train = application("master_weights", program, heavy=True)
    parts = {"fabric.py": ("steps=3", "first=3"), "accelerated.py": ("batches=6", "first=6")}[program]
    assert steps_and_wrong(train(*WITH, "result=whole.pt")) == [(6, 0)]
    check_kept(load(train, "whole.pt"))
    train(*WITH, parts[0], "save=checkpoint", "result=half.pt")
    run = train(*WITH, *parts, "resume=checkpoint", "result=resumed.pt")
    assert steps_and_wrong(run) == [(3, 0)]
    check_same(load(train, "resumed.pt"), load(train, "whole.pt"))


@pytest.mark.parametrize("program", ["fabric.py", "accelerated.py"])
def test_fabric_and_accelerate_go_on_from_a_checkpoint_made_without(application, program):
    """And without master weights from one that was made with them."""
    train = application("master_weights", program, heavy=True)
    parts = {"fabric.py": ("steps=3", "first=3"), "accelerated.py": ("batches=6", "first=6")}[program]
    train(*WITHOUT, parts[0], "save=without")
    run = train(*WITH, *parts, "resume=without")
    assert steps_and_wrong(run) == [(3, 0)]
    check_kept(load(train))
    train(*WITH, parts[0], "save=with")
    train(*WITHOUT, *parts, "resume=with")
    assert load(train)["states"][0]["exp_avg"].dtype is torch.bfloat16
