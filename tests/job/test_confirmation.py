"""The line that confirms what came of it all, at the first step of every job."""

import pytest
import torch
from jobs import CHOSEN, NO_MODEL, PEFT, SET, Kept, record, step, weights
from torch import nn

from precision_policy.job.words import FP16

pytest_plugins = ["armed_job"]
pytestmark = pytest.mark.once


@pytest.fixture
def confirmed(said):
    """The lines that confirm."""
    return lambda: [
        line.split(": ", 1)[1] for line in said("INFO") if "trainable tensor" in line and "master copy:" not in line
    ]


def train(model, make=torch.optim.AdamW, steps=1, **options):
    optimizer = make([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-5, **options})
    first = next(model.parameters())
    for _ in range(steps):
        model(torch.randn(64, first.shape[-1]).to(first.dtype)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(dtype)


@pytest.mark.parametrize("decision", [CHOSEN, NO_MODEL, PEFT, SET], ids=lambda decision: decision.rule)
@pytest.mark.parametrize("action", ["warn", "error", "ignore"])
def test_every_job_is_confirmed(arm, said, confirmed, decision, action):
    """Whatever was decided, once, and a healthy one by nothing else."""
    arm(record(decision, bf16_adam=action))
    train(network(), steps=3)
    assert confirmed() == [
        "4 trainable tensors, 2,112 elements: stored in fp32, updated in fp32, called under no autocast or mixed precision"
    ]
    assert said() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_in_another_dtype(arm, confirmed, dtype):
    arm(record(bf16_adam="ignore"))
    step(torch.optim.SGD(weights(dtype), lr=1e-5))
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "float64"}[dtype]
    assert confirmed()[0].startswith(f"1 trainable tensor, 16 elements: stored in {name}, updated in {name}")


def test_several_dtypes_in_one_optimizer(arm, confirmed):
    arm(record(bf16_adam="ignore"))
    step(torch.optim.SGD([*weights(count=2), *weights(torch.float32)], lr=1e-5))
    assert confirmed() == [
        "3 trainable tensors, 48 elements: 2 tensors (32 elements) stored in bf16, updated in bf16; "
        "1 tensor (16 elements) stored in fp32, updated in fp32"
    ]


def test_what_is_frozen(arm, confirmed):
    """In each dtype, of the module that was called and of the optimizer's own groups, each tensor once."""
    arm()
    model = network()
    model[0].weight.requires_grad_(False)
    model[0].bias = nn.Parameter(model[0].bias.detach().double(), requires_grad=False)
    model[0].forward = lambda x: x
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for _ in range(2):
        model(torch.randn(64, 32)).pow(2).mean().backward()
        optimizer.step()
    assert confirmed() == [
        "2 trainable tensors, 1,056 elements: stored in fp32, updated in fp32, called under no autocast or mixed precision; "
        "1,024 elements frozen, stored in fp32; 32 elements frozen, stored in float64"
    ]


def test_lora_in_code_over_a_base_that_is_set(arm, confirmed):
    """Nothing in the config told of adapters; the frozen part is seen in the model."""
    arm(record(SET))
    model = network()
    model[0].requires_grad_(False)
    train(model)
    assert confirmed()[0].endswith("; 1,056 elements frozen, stored in fp32")


def test_several_optimizers_are_confirmed_together(armed, confirmed):
    """When the last of them has stepped, so that the line is true of the whole job."""
    model = network()
    first, second = (torch.optim.SGD(part.parameters(), lr=1e-5) for part in model)
    model(torch.randn(64, 32)).pow(2).mean().backward()
    first.step()
    assert confirmed() == []
    second.step()
    assert confirmed() == [
        "4 trainable tensors, 2,112 elements in 2 optimizers: stored in fp32, updated in fp32, called under no autocast or mixed precision"
    ]
    first.step()
    assert len(confirmed()) == 1


def test_an_optimizer_that_never_steps_is_not_waited_for(armed, confirmed):
    """The second step of another tells; a later one is told where it differs."""
    later = torch.optim.SGD(weights(torch.float64), lr=1e-5)
    optimizer = torch.optim.SGD(weights(torch.float32), lr=1e-5)
    step(optimizer)
    assert confirmed() == []
    step(optimizer)
    assert confirmed() == ["1 trainable tensor, 16 elements: stored in fp32, updated in fp32"]
    step(later)
    assert confirmed()[1:] == ["1 trainable tensor, 16 elements: stored in float64, updated in float64"]
    step(torch.optim.SGD(weights(torch.float32), lr=1e-5))
    assert len(confirmed()) == 2


def test_an_optimizer_that_never_steps_in_a_short_job(arm, confirmed):
    """The end of the job tells."""
    stack = arm()
    waiting = torch.optim.SGD(weights(torch.float64), lr=1e-5)
    step(torch.optim.SGD(weights(torch.float32), lr=1e-5))
    assert confirmed() == []
    stack.close()
    assert confirmed() == ["1 trainable tensor, 16 elements: stored in fp32, updated in fp32"]
    del waiting


def test_an_optimizer_around_another_counts_once(armed, confirmed):
    """As ZeroRedundancyOptimizer is: two optimizers over the same parameters."""

    class Around(torch.optim.Optimizer):
        def __init__(self, params):
            self.inner = torch.optim.SGD(params, lr=1e-5)
            super().__init__(params, {"lr": 1e-5})

        def step(self, closure=None):
            self.inner.step()

    step(Around(weights(torch.float32)))
    assert confirmed() == ["1 trainable tensor, 16 elements: stored in fp32, updated in fp32"]


def test_a_step_of_the_applications_own(armed, confirmed):
    """What it updates in is not known, and not said."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    step(Own(weights(torch.float32), lr=1e-5))
    assert confirmed() == ["1 trainable tensor, 16 elements: stored in fp32"]


MASTERS = record(master_weights=True, bf16_adam="ignore")


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (
            Kept(2, 32, 192),
            "stored in bf16, updated in fp32 by master weights that the policy keeps (adds 192 B per rank)",
        ),
        (
            None,
            "stored in bf16, updated in bf16, no master weights for 2 tensors: the step never came through a class of torch.optim",
        ),
        (
            Kept(0, 0, 0, {"sparse gradients": 2}),
            "stored in bf16, updated in bf16, no master weights for 2 tensors: sparse gradients",
        ),
        (
            Kept(1, 16, 96, {"sparse gradients": 1}),
            "1 tensor (16 elements) stored in bf16, updated in fp32 by master weights that the policy keeps (adds 96 B per rank); "
            "1 tensor (16 elements) stored in bf16, updated in bf16, no master weights for 1 tensor: sparse gradients",
        ),
        (
            Kept(1, 16, 96),
            "1 tensor (16 elements) stored in bf16, updated in fp32 by master weights that the policy keeps (adds 96 B per rank); "
            "1 tensor (16 elements) stored in bf16, not updated in the first step",
        ),
    ],
)
def test_master_weights(arm, confirmed, masters, kept, told):
    """Written from what the step did."""
    masters.kept = lambda optimizer: kept
    arm(MASTERS)
    step(torch.optim.SGD(weights(count=2), lr=1e-5))
    assert confirmed() == [f"2 trainable tensors, 32 elements: {told}"]


def test_master_weights_of_several_optimizers(arm, confirmed, masters):
    """Their bytes and their reasons add up."""
    answers = iter([Kept(1, 16, 96), Kept(1, 16, 96), Kept(0, 0, 0, {"a": 1}), Kept(0, 0, 0, {"a": 1})])
    asked = {}
    masters.kept = lambda optimizer: asked.setdefault(optimizer, next(answers, None))
    arm(MASTERS)
    for optimizer in [torch.optim.SGD(weights(), lr=1e-5) for _ in range(4)]:
        step(optimizer)
    assert confirmed() == [
        "4 trainable tensors, 64 elements in 4 optimizers: "
        "2 tensors (32 elements) stored in bf16, updated in fp32 by master weights that the policy keeps (adds 192 B per rank); "
        "2 tensors (32 elements) stored in bf16, updated in bf16, no master weights for 2 tensors: a"
    ]


def test_master_weights_beside_fp32(arm, confirmed, masters):
    masters.kept = lambda optimizer: Kept(1, 16, 96)
    arm(MASTERS)
    step(torch.optim.SGD([*weights(), *weights(torch.float32)], lr=1e-5))
    assert confirmed() == [
        "2 trainable tensors, 32 elements: "
        "1 tensor (16 elements) stored in bf16, updated in fp32 by master weights that the policy keeps (adds 96 B per rank); "
        "1 tensor (16 elements) stored in fp32, updated in fp32"
    ]


def test_master_weights_of_an_optimizer_around_another(arm, confirmed, masters):
    """As ZeroRedundancyOptimizer is: the inner one has this rank's part, and what it adds counts once."""

    class Around(torch.optim.Optimizer):
        def __init__(self, params):
            self.inner = torch.optim.SGD(params[:1], lr=1e-5)
            super().__init__(params, {"lr": 1e-5})

        def step(self, closure=None):
            self.inner.step()

    masters.kept = lambda optimizer: Kept(1, 16, 96)
    arm(MASTERS)
    step(Around(weights(count=3)))
    assert confirmed() == [
        "3 trainable tensors, 48 elements in 2 optimizers: stored in bf16, updated in fp32 by master weights that the policy keeps "
        "(adds 96 B per rank)"
    ]


def test_master_weights_and_nothing_in_bf16(arm, confirmed, masters):
    masters.kept = lambda optimizer: Kept(0, 0, 0)
    arm(MASTERS)
    step(torch.optim.SGD(weights(torch.float32), lr=1e-5))
    assert confirmed() == [
        "1 trainable tensor, 16 elements: stored in fp32, updated in fp32; "
        "no master weights are kept, as nothing trainable is stored in bf16"
    ]


def test_master_weights_and_nothing_in_bf16_in_a_later_optimizer(arm, confirmed, masters):
    """Of the job, that is not true."""
    masters.kept = lambda optimizer: Kept(1, 16, 96)
    arm(MASTERS)
    step(torch.optim.SGD(weights(), lr=1e-5))
    step(torch.optim.SGD(weights(torch.float32), lr=1e-5))
    assert confirmed()[1:] == ["1 trainable tensor, 16 elements: stored in fp32, updated in fp32"]


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (
            Kept(0, 0, 0, {"sparse gradients": 1, FP16: 1}),
            "1 tensor (16 elements) stored in bf16, updated in bf16, no master weights for 1 tensor: sparse gradients; ",
        ),
        (Kept(0, 0, 0, {FP16: 1}), "1 tensor (16 elements) stored in bf16, not updated in the first step; "),
    ],
)
def test_bf16_and_fp16_without_master_weights(arm, confirmed, masters, kept, told):
    """Each is told its own reason, once."""
    masters.kept = lambda optimizer: kept
    arm(MASTERS)
    step(torch.optim.SGD([*weights(), *weights(torch.float16)], lr=1e-5))
    assert confirmed() == [
        f"2 trainable tensors, 32 elements: {told}"
        f"1 tensor (16 elements) stored in fp16, updated in fp16, no master weights for 1 tensor: {FP16}"
    ]


def test_master_weights_and_fp16(arm, confirmed, masters):
    masters.kept = lambda optimizer: Kept(0, 0, 0, {"fp16 needs loss scaling as well": 1})
    arm(MASTERS)
    step(torch.optim.SGD(weights(torch.float16), lr=1e-5))
    assert confirmed()[0].startswith(
        "1 trainable tensor, 16 elements: stored in fp16, updated in fp16, "
        "no master weights for 1 tensor: fp16 needs loss scaling as well"
    )
