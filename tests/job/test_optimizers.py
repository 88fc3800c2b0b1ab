"""What is known of optimizers outside torch: those that install on a CPU for real, the others by a class of the same name."""

import logging

import pytest
import torch

from precision_policy.job import optimizers
from precision_policy.job.monitor import Monitor
from precision_policy.job.plan import Plan
from precision_policy.job.watch import Watch

pytestmark = pytest.mark.once


def weights(dtype=torch.bfloat16):
    return [torch.nn.Parameter(torch.ones(4, 4).to(dtype))]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "precision_policy")
    watch = Watch(Plan("precision_policy=on", fix="net.dtype=float32"))
    watch.arm()
    yield lambda level="WARNING": [
        r.getMessage() for r in caplog.records if r.levelname == level and r.name == "precision_policy"
    ]
    watch.disarm()


def test_optimi(said):
    """Kahan summation is on by itself for bf16; only its absence is worth a warning."""
    optimi = pytest.importorskip("optimi")
    optimi.AdamW(weights(), lr=1e-5)
    optimi.SGD(weights(), lr=1e-5, kahan_sum=False)
    assert said() == []
    optimi.AdamW(weights(), lr=1e-5, kahan_sum=False)
    assert said()[0].startswith("precision_policy=on: optimi.adamw.AdamW over bf16 weights")


def test_torchao(said):
    """Stochastic rounding is off by default; its argument is read while the constructor still runs."""
    torchao = pytest.importorskip("torchao.optim")
    torchao.AdamW8bit(weights(), lr=1e-5, bf16_stochastic_round=True)
    assert said() == []
    torchao.AdamW8bit(weights(), lr=1e-5)
    assert "AdamW8bit over bf16 weights" in said()[0]


def test_bitsandbytes(said):
    """It keeps none; its state does not grow with the storage dtype."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.SGD(weights(), lr=1e-5, momentum=0.9)
    assert said() == []
    bitsandbytes.optim.AdamW8bit(weights(), lr=1e-5)
    (text,) = said()
    assert "AdamW8bit over bf16 weights" in text
    assert "optimizer state 0 B" in text


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


def test_transformer_engine(said):
    """Mocked, it needs a GPU: by its flag, which it stores only after torch's constructor has returned."""
    TE(weights(), master_weights=True)
    assert said() == []
    TE(weights())
    assert "FusedAdam over bf16 weights" in said()[0]


def test_fp32_under_a_master_copy(said):
    """Mocked as above: one INFO line with the bytes wasted."""
    TE(weights(torch.float32), master_weights=True)
    assert said() == []
    (line,) = said("INFO")
    assert "keeps an fp32 master copy of its own" in line
    assert "32 B less for weights" in line


def test_apex_ignores_its_flag_for_bf16(said):
    """Mocked, it needs a GPU."""
    APEX(weights(), master_weights=True)
    assert len(said()) == 1


def test_what_a_mock_of_apex_keeps():
    """Its master weights are for fp16 alone; the flag is read from the instance too."""
    optimizer = APEX(weights(), master_weights=True)
    known = optimizers.look_up(optimizer)
    assert [known.keeps(optimizer, dtype) for dtype in (torch.float16, torch.bfloat16)] == ["master", "nothing"]
    optimizer.master_weights = False
    assert known.keeps(optimizer, torch.float16) == "nothing"
    assert optimizers._argument(optimizer, "no such argument") is None


def test_deepspeed_is_judged_at_its_first_step(said):
    """Mocked, it needs compiled kernels: the class keeps none, but its engine swaps fp32 copies in before that."""
    swapped = DEEPSPEED(weights())
    swapped.param_groups[0]["params"] = weights(torch.float32)
    swapped.step()
    assert said() == []
    alone = DEEPSPEED(weights())
    assert said() == []
    alone.step()
    assert len(said()) == 1


def test_every_entry_names_its_source():
    for known in optimizers.KNOWN:
        assert ".py" in known.source


@pytest.mark.parametrize("every", [1, 3])
def test_monitor(caplog, every):
    """One line every so many steps, the share of a sample; nothing is left on torch."""
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    caplog.set_level(logging.INFO, "precision_policy")
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter((torch.randn(300, 1000, generator=generator) * 0.02).to(torch.bfloat16))
    optimizer = torch.optim.AdamW([param], lr=1e-5)
    monitor = Monitor(every)
    monitor.start()
    for _ in range(6):
        param.grad = torch.randn(300, 1000, generator=generator).to(torch.bfloat16)
        before = param.detach().clone()
        optimizer.step()
        share = 100 * (param == before).double().mean().item()
        if caplog.records and every == 1:
            told = float(caplog.records[-1].getMessage().split(": ")[2].split("%")[0])
            assert told == pytest.approx(share, abs=1.0)
    monitor.stop()
    optimizer.step()
    assert len(caplog.records) == 6 // every
    assert int(caplog.records[0].getMessage().split("sample of ")[1].split()[0]) <= 2**16
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_monitor_in_a_job(app):
    run = app()("+precision_policy=on", "precision_policy.monitor.every=1")
    assert (
        "INFO precision_policy=on: step 1: 0.0% of a sample of 64 weights left unchanged by torch.optim.AdamW at lr 1e-05"
        in run.log
    )
