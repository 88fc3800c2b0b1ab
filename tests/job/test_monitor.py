"""The live share of weights that a step leaves unchanged."""

import pytest
import torch
from jobs import normal, record
from torch import nn

pytest_plugins = ["armed_job"]
QUIET = {"bf16_adam": "ignore"}


@pytest.fixture
def monitored(arm, said):
    """A job with a monitor, and the lines that this one has said."""
    arm(record(monitor_every=1, **QUIET))
    return lambda: [line for line in said("INFO") if ": step " in line]


def stepped(*params, kind=torch.optim.SGD, lr=1.0):
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = kind(params, lr=lr)
    optimizer.step()
    return optimizer


@pytest.mark.once
@pytest.mark.parametrize("every", [1, 3])
def test_the_share_of_each_step(arm, said, every):
    """One line every so many steps, the share of a sample; nothing is left on torch."""
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    stack = arm(record(monitor_every=every, **QUIET))
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter((torch.randn(300, 1000, generator=generator) * 0.02).to(torch.bfloat16))
    optimizer = torch.optim.AdamW([param], lr=1e-5)
    for _ in range(6):
        param.grad = torch.randn(300, 1000, generator=generator).to(torch.bfloat16)
        before = param.detach().clone()
        optimizer.step()
        share = 100 * (param == before).double().mean().item()
        if every == 1:
            told = float(said("INFO")[-1].split(": ")[2].split("%")[0])
            assert told == pytest.approx(share, abs=1.0)
    stack.close()
    optimizer.step()
    lines = [line for line in said("INFO") if ": step " in line]
    assert len(lines) == 6 // every
    assert int(lines[0].split("sample of ")[1].split()[0].replace(",", "")) <= 2**16
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


@pytest.mark.once
def test_where_the_step_adds_a_group(monitored, said):
    class Adds(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.add_param_group({"params": [normal()]})

    optimizer = stepped(normal(), kind=Adds)
    optimizer.step()
    assert said() == []
    assert len(monitored()) == 2


@pytest.mark.once
def test_all_parameters_of_a_group_count(monitored):
    """With separators where there are thousands."""
    stepped(normal(), normal(8), nn.Parameter(torch.empty(4, 4, device="meta")))
    assert "a sample of 4,104 weights" in monitored()[0]


class Refuses(torch.Tensor):
    """A weight of a tensor subclass whose values cannot be viewed."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.view, torch.Tensor.is_contiguous):
            raise TypeError("no views of me")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.once
def test_a_tensor_subclass(monitored):
    """It reports what it can read, and leaves out what refuses."""
    stepped(nn.Parameter(torch.randn(8, 8).as_subclass(Refuses)), normal())
    assert "a sample of 4,096 weights" in monitored()[0]


@pytest.mark.once
def test_it_never_ends_a_job(monitored, said, monkeypatch, caplog):
    monkeypatch.setattr("precision_policy.job.monitor._sample", lambda *a: 1 / 0)
    stepped(normal()).step()
    assert said() == ["precision_policy=on: the monitor could not read a step; the job goes on"]
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.once
def test_a_diverged_weight_that_stays_so_is_unchanged(monitored):
    """A NaN equals itself here; zeros of other signs do not."""
    nan = nn.Parameter(torch.full((4, 4), float("nan"), dtype=torch.bfloat16))
    stepped(nan)
    assert "100.0% of a sample of 16 weights left unchanged" in monitored()[0]


class Keeps(torch.optim.SGD):
    """Leaves weights as they are, and moves the low bits that it keeps of some of them as the master weights do."""

    moves = 4

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if "master_low_bits" not in state:
                state["master_low_bits"] = torch.zeros_like(param)
            bits = state["master_low_bits"].view(torch.int16)
            for row in range(self.moves):
                bits[row] += 0x7FC1 if row else 1  # as bf16 these are NaN and a subnormal


@pytest.mark.once
@pytest.mark.parametrize("transposed", [False, True])
def test_low_bits_that_moved_are_a_move(monitored, transposed):
    """Also those that came in this step, where there were none before. Of 16 rows 4 moved."""
    weights = normal(16, 8)
    if transposed:
        weights = nn.Parameter(torch.empty(8, 16, dtype=torch.bfloat16).t().fill_(1))
    optimizer = Keeps([weights, normal(16, 8)], lr=1.0)
    optimizer.step()
    optimizer.step()
    assert [line.split(": ")[2] for line in monitored()] == [
        "75.0% of a sample of 256 weights with their master weights left unchanged by test_monitor.Keeps at lr 1"
    ] * 2


class KeepsCopies(torch.optim.SGD):
    """Keeps whole copies in fp32, as the master weights do under FSDP1, and moves the first of 16 rows."""

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            copy = self.state[param].setdefault("master_param", param.detach().float())
            copy[0] *= 1 + 1e-6


@pytest.mark.once
def test_whole_copies_that_moved_are_a_move(monitored):
    """The first of them are compared with the weights that they were made of, negative ones among these."""
    optimizer = KeepsCopies([normal(16, 8)], lr=1.0)
    optimizer.step()
    optimizer.step()
    assert [line.split(": ")[2].split("%")[0] for line in monitored()] == ["93.8"] * 2


@pytest.mark.once
def test_low_bits_of_a_sample_are_those_of_its_weights(monitored, monkeypatch):
    """Of two tensors with a stride of 3, where only the first row of each moved."""
    monkeypatch.setattr("precision_policy.job.monitor._PER_GROUP", 100)
    monkeypatch.setattr(Keeps, "moves", 1)
    Keeps([normal(10, 14), normal(10, 15)], lr=1.0).step()
    # Elements 0, 3, ..., 12 of the first tensor's first row; 1, 4, ..., 13 of the second's, which begins at 140.
    assert f"{87 / 97:.1%} of a sample of 97 weights" in monitored()[0]


def test_in_a_job(application):
    run = application("bf16_weight")("+precision_policy=on", "precision_policy.monitor.every=1")
    assert (
        "INFO precision_policy=on: step 1: 0.0% of a sample of 64 weights left unchanged by torch.optim.AdamW at lr 1e-05"
        in run.log
    )


@pytest.mark.parametrize("arguments", [["precision_policy.bf16_adam=ignore"], ["+peft=true", "precision_policy.peft=peft"]])
def test_where_the_warning_is_silenced(application, arguments):
    words = ["+precision_policy=on", "model.torch_dtype=bfloat16", "precision_policy.monitor.every=1"]
    run = application("bf16_weight")(*words, *arguments)
    assert "WARNING" not in run.log
    assert "step 1: 100.0% of a sample of 64 weights left unchanged" in run.log
