"""What is known of optimizers outside torch: those that install on a CPU for real, the others by a class of the same name."""

import pytest
import torch
from jobs import record, step, weights

from precision_policy.job import optimizers
from precision_policy.job.storage import Bf16AdamError

pytest_plugins = ["armed_job"]
pytestmark = pytest.mark.once


def test_optimi(armed, said):
    """Kahan summation is on by itself for bf16; only its absence is worth a warning."""
    optimi = pytest.importorskip("optimi")
    optimizer = optimi.AdamW(weights(), lr=1e-5)
    optimi.SGD(weights(), lr=1e-5, kahan_sum=False)
    step(optimizer)
    assert said() == []
    assert "stored in bf16, updated by optimi.adamw.AdamW, which makes up for rounding" in said("INFO")[0]
    optimi.AdamW(weights(), lr=1e-5, kahan_sum=False)
    assert said()[0].startswith("precision_policy=on: optimi.adamw.AdamW over bf16 weights")


def test_torchao(armed, said):
    """Stochastic rounding is off by default; its argument is there at the first step, and not while torch's constructor runs."""
    torchao = pytest.importorskip("torchao.optim")
    for rounds in (True, False):
        optimizer = torchao.AdamW8bit(weights(), lr=1e-5, bf16_stochastic_round=rounds)
        assert said() == []
        optimizer.step()  # without gradients, so that nothing is compiled
    assert "AdamW8bit over bf16 weights" in said()[0]


def test_bitsandbytes(armed, said):
    """It keeps none; its state does not grow with the storage dtype. No master weights are advised, which it cannot have."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.SGD(weights(), lr=1e-5, momentum=0.9)
    assert said() == []
    bitsandbytes.optim.AdamW8bit(weights(), lr=1e-5)
    (text,) = said()
    assert "AdamW8bit over bf16 weights" in text
    assert "optimizer state 0 B" in text
    assert "fix, to store the model in fp32:\n    model.dtype=float32\n" in text
    assert "master_weights" not in text


def mock(module, name, flag=None):
    """A class under the name of one that needs a GPU: it takes its flag, and stores it after torch's constructor returned."""

    class Plain(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-5):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            return None

    class Flagged(Plain):
        def __init__(self, params, master_weights=False):
            super().__init__(params)
            self.master_weights = master_weights

    kind = Flagged if flag else Plain
    kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
    return kind


TE = mock("transformer_engine.pytorch.optimizers.fused_adam", "FusedAdam", flag="master_weights")
APEX = mock("apex.optimizers.fused_adam", "FusedAdam", flag="master_weights")
DEEPSPEED = mock("deepspeed.ops.adam.fused_adam", "FusedAdam")


def test_transformer_engine(armed, said):
    """Mocked, it needs a GPU: by its flag, which it stores only after torch's constructor has returned."""
    TE(weights(), master_weights=True).step()
    assert said() == []
    (confirmed,) = said("INFO")
    assert confirmed.endswith(
        "updated in fp32 by a master copy that transformer_engine.pytorch.optimizers.fused_adam.FusedAdam keeps"
    )
    plain = TE(weights())
    assert said() == []
    plain.step()
    assert "FusedAdam over bf16 weights" in said()[0]


def test_fp32_under_a_master_copy(armed, said):
    """Mocked as above: one INFO line with the bytes wasted."""
    TE(weights(torch.float32), master_weights=True).step()
    assert said() == []
    line = said("INFO")[0]
    assert "keeps an fp32 master copy of its own" in line
    assert "32 B less for weights" in line


def test_apex_ignores_its_flag_for_bf16(armed, said):
    """Mocked, it needs a GPU."""
    APEX(weights(), master_weights=True).step()
    assert len(said()) == 1


def test_what_a_mock_of_apex_keeps():
    """Its master weights are for fp16 alone."""
    optimizer = APEX(weights(), master_weights=True)
    known = optimizers.look_up(optimizer)
    assert [known.keeps(optimizer, dtype) for dtype in (torch.float16, torch.bfloat16)] == ["master", "nothing"]
    optimizer.master_weights = False
    assert known.keeps(optimizer, torch.float16) == "nothing"


def test_deepspeed_is_judged_at_its_first_step(armed, said):
    """Mocked, it needs compiled kernels: the class keeps none, but its engine swaps fp32 copies in before that."""
    swapped = DEEPSPEED(weights())
    swapped.param_groups[0]["params"] = weights(torch.float32)
    swapped.step()
    assert said() == []
    alone = DEEPSPEED(weights())
    assert said() == []
    alone.step()
    assert len(said()) == 1


def test_strict_waits_for_what_tells_at_its_first_step(arm):
    arm(record(bf16_adam="error"))
    TE(weights(), master_weights=True).step()
    plain = TE(weights())
    with pytest.raises(Bf16AdamError):
        plain.step()


def test_every_entry_names_its_source():
    for known in optimizers.KNOWN:
        assert ".py" in known.source


class OwnStep(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class NoStep(torch.optim.SGD):
    pass


@pytest.mark.parametrize(("kind", "is_known"), [(torch.optim.SGD, True), (NoStep, True), (OwnStep, False), (TE, False)])
def test_whose_step_it_is(kind, is_known):
    """A step of the application's own may do anything; torch's hooks around it hide nothing."""
    optimizer = kind(weights())
    step(optimizer)
    assert optimizers.steps_as_known(optimizer) is is_known


STATES = [
    ("SGD", {}, 0),
    ("SGD", {"momentum": 0.9}, 2),
    ("RMSprop", {"centered": True, "momentum": 0.9}, 6),
    ("Adam", {"amsgrad": True}, 6),
    ("AdamW", {}, 4),
    ("Adagrad", {}, 2),
    ("Adadelta", {}, 4),
    ("ASGD", {}, 2),
    ("Rprop", {}, 4),
    ("Muon", {}, 2),
    ("RAdam", {}, 4),
    ("Adamax", {}, 4),
    ("NAdam", {}, 4),
]


@pytest.mark.parametrize(("name", "options", "bytes_per_element"), STATES)
def test_how_much_the_state_grows(name, options, bytes_per_element):
    """As counted after a step in bf16 and in fp32."""
    kind = getattr(torch.optim, name, None)
    if kind is None:
        pytest.skip("a newer torch has it")
    sizes = {}
    for dtype in (torch.bfloat16, torch.float32):
        optimizer = kind(weights(dtype), lr=1e-3, **options)
        step(optimizer)
        held = [v for state in optimizer.state.values() for v in state.values()]
        sizes[dtype] = sum(v.nbytes for v in held if torch.is_tensor(v) and v.numel() == 16)
    known, (group,) = optimizers.look_up(optimizer), optimizer.param_groups
    assert optimizers.state_growth(known, group) == bytes_per_element
    assert sizes[torch.float32] - sizes[torch.bfloat16] == 16 * bytes_per_element


@pytest.mark.parametrize(
    ("make", "may"),
    [
        (lambda: torch.optim.AdamW(weights()), True),
        (lambda: torch.optim.AdamW(weights(), differentiable=True), False),
        (lambda: torch.optim.LBFGS(weights()), False),
        (lambda: torch.optim.SparseAdam(weights()), False),
        (lambda: TE(weights()), False),
    ],
)
def test_for_which_master_weights_are_advised(armed, said, make, may):
    optimizer = make()
    assert optimizers.may_have_master_weights(optimizer, optimizers.look_up(optimizer)) is may
