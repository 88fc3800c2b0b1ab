"""What the watch says, what it keeps silent about, and what it leaves behind."""

import copy
import logging
import pickle
import threading

import pytest
import torch
from conftest import CONFIG
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from precision_policy.job.plan import Plan
from precision_policy.job.watch import Bf16AdamError, Watch


def weights(dtype=torch.bfloat16, count=1, requires_grad=True):
    return [torch.nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=requires_grad) for _ in range(count)]


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "precision_policy")
    return lambda level="WARNING": [r.getMessage() for r in caplog.records if r.levelname == level]


@pytest.fixture
def armed():
    watch = Watch(Plan("precision_policy=on", fix="net.dtype=float32"))
    watch.arm()
    yield watch
    watch.disarm()


def test_says_what_it_must(armed, said):
    """Class, tensors, elements, shares, decay, cost and fix, in one record whose first line is short."""
    torch.optim.AdamW(weights(count=3), lr=1e-5, weight_decay=0.01)
    (text,) = said()
    first, *rest = text.splitlines()
    assert len(first) < 124
    assert first.startswith("precision_policy=on: ")
    assert "torch.optim.AdamW" in first
    assert "100.0%" in first
    assert any("3 trainable tensors (48 elements)" in line for line in rest)
    assert any("inert" in line for line in rest)
    assert "fp32 storage adds: weights 96 B, gradients 96 B, optimizer state 192 B" in text
    assert rest[0].startswith("  fix: net.dtype=float32  (activations double too")
    assert rest[1] == "  or keep bf16 with a compensating optimizer: torch-optimi, with Kahan summation  (adds 96 B)"


class Mine(torch.optim.AdamW):
    pass


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, Mine])
def test_adam_and_subclasses(armed, said, kind):
    kind(weights(), lr=1e-5)
    assert len(said()) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.optim.SGD(weights(), lr=1e-5),
        lambda: torch.optim.Adagrad(weights(), lr=1e-5),
        lambda: torch.optim.AdamW(weights(torch.float32), lr=1e-5),
        lambda: torch.optim.AdamW(weights(torch.float16), lr=1e-5),
        lambda: torch.optim.AdamW(weights(requires_grad=False) + weights(torch.float32), lr=1e-5),
    ],
)
def test_silence(armed, said, make):
    step(make())
    assert said() + said("INFO") == []


def test_once_per_job(armed, said):
    for _ in range(3):
        step(torch.optim.AdamW(weights(), lr=1e-5))
    assert len(said()) == 1


def test_a_second_job_warns_again(said):
    for _ in range(2):
        watch = Watch(Plan("precision_policy=on", fix="x=float32"))
        watch.arm()
        torch.optim.AdamW(weights(), lr=1e-5)
        watch.disarm()
        torch.optim.AdamW(weights(), lr=1e-5)
    assert len(said()) == 2


def test_torch_is_as_it_was(said):
    before = torch.optim.Optimizer.__init__
    watch = Watch(Plan("precision_policy=on", fix="x=float32"))
    watch.arm()
    assert torch.optim.Optimizer.__init__ is not before
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    step(optimizer)
    watch.disarm()
    assert torch.optim.Optimizer.__init__ is before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_someone_wrapped_on_top(said):
    """Their wrapper stays; the watch in it sleeps."""
    before = torch.optim.Optimizer.__init__
    watch = Watch(Plan("precision_policy=on", fix="x=float32"))
    watch.arm()
    inner = torch.optim.Optimizer.__init__
    theirs = lambda self, *args, **kwargs: inner(self, *args, **kwargs)  # noqa: E731
    torch.optim.Optimizer.__init__ = theirs
    try:
        watch.disarm()
        assert torch.optim.Optimizer.__init__ is theirs
        torch.optim.AdamW(weights(), lr=1e-5)
        assert said() == []
    finally:
        torch.optim.Optimizer.__init__ = before


def test_hooks_of_others_survive_the_first_step(armed):
    """A hook that others registered after ours is neither lost nor tripped over."""
    seen = []
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    step(optimizer)
    step(optimizer)
    assert seen == ["pre", "post"] * 2
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


def test_two_watches_at_once(armed, said):
    """A job inside a job: each says its own, neither trips over the other's hooks, and none of those stay."""
    inner = Watch(Plan("precision_policy=on", fix="inner=float32"))
    inner.arm()
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    inner.disarm()
    for _ in range(3):
        step(optimizer)
    assert len(said()) == 2
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_hook_that_registers_hooks(armed, said):
    """Somebody's hook before the step registers one after it, behind the watch's own: nothing is walked over while it changes."""
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    seen, theirs = [], []

    def register_once(*a):
        if not theirs:
            theirs.append(optimizer.register_step_post_hook(lambda *a: seen.append("post")))

    optimizer.register_step_pre_hook(register_once)
    for _ in range(3):
        step(optimizer)
    assert seen == ["post"] * 3
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


def test_many_tensors_and_one_low(armed, said):
    """Beyond what construction looks at, the first step finds it."""
    optimizer = torch.optim.AdamW([*weights(torch.float32, 2000), *weights()], lr=1e-5)
    step(optimizer)
    assert len(said()) == 1


def test_alternating_layers(armed, said):
    """Every second tensor in bf16 is seen at construction, whatever the sample's stride."""
    params = [p for _ in range(1024) for p in (*weights(torch.float32), *weights())]
    torch.optim.AdamW(params, lr=1e-5)
    assert len(said()) == 1


def test_parameters_that_come_later(armed, said):
    """A group added between construction and the first step counts."""
    optimizer = torch.optim.AdamW(weights(torch.float32), lr=1e-5)
    optimizer.add_param_group({"params": weights()})
    step(optimizer)
    assert len(said()) == 1


def test_engine_swaps_fp32_in(armed, said):
    """What DeepSpeed and Megatron do between construction and the first step takes the warning back."""
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    optimizer.param_groups[0]["params"] = weights(torch.float32)
    step(optimizer)
    assert len(said()) == 1
    assert len(said("INFO")) == 1
    assert "taken back" in said("INFO")[0]


def test_an_optimizer_with_the_number_of_one_that_is_gone(armed, said):
    """It starts anew: nothing is taken back of a warning that was about another. Constructed again, it has the same number."""
    optimizer = torch.optim.AdamW(weights())
    optimizer.__init__(weights(torch.float32))
    step(optimizer)
    assert said("INFO") == []


def test_asked_against_came(said):
    """fp32 was asked for and bf16 came: the warning says that instead, with names where it has any."""
    watch = Watch(Plan("precision_policy=on", fix="model.torch_dtype=float32", asked="model.torch_dtype=float32"))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).to(torch.bfloat16)
    watch.arm()
    try:
        torch.optim.AdamW(model.named_parameters(), lr=1e-5)
    finally:
        watch.disarm()
    (text,) = said()
    assert text.startswith(
        "precision_policy=on: model.torch_dtype=float32 asked for fp32 storage, but 4 of 4 tensors came in bf16"
    )
    assert "0.weight, 0.bias, 1.weight" in text
    assert "recast" in text


def test_a_share_of_nearly_nothing(armed, said):
    torch.optim.AdamW(weights(), lr=0.1)
    assert "0.0% of updates round away at lr 0.1" in said("INFO")[0]
    assert not said("WARNING")


def test_strict_refuses_a_share_of_nearly_nothing(said):
    """And says that the schedule will get there; the table is an ERROR."""
    watch = Watch(Plan("precision_policy=strict", action="error"))
    watch.arm()
    try:
        with pytest.raises(Bf16AdamError, match=r"; the schedule will get there$"):
            torch.optim.AdamW(weights(), lr=0.1)
    finally:
        watch.disarm()
    assert "weights that an update cannot move" in said("ERROR")[0]


def test_strict_raises(said):
    watch = Watch(Plan("precision_policy=strict", fix="x=float32", action="error"))
    watch.arm()
    try:
        with pytest.raises(Bf16AdamError, match="fix: x=float32"):
            torch.optim.AdamW(weights(), lr=1e-5)
        torch.optim.SGD(weights(), lr=1e-5)
    finally:
        watch.disarm()


def test_copies(armed, said):
    """An optimizer that is deep-copied or pickled during the watch works, and nothing is warned twice."""
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        step(copied)
    step(optimizer)
    assert len(said()) == 1


def test_threads(armed, said):
    barrier = threading.Barrier(8)

    def build():
        barrier.wait()
        torch.optim.AdamW(weights(), lr=1e-5)

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said()) == 1


class Broken(torch.optim.AdamW):
    def __init__(self, params):
        super().__init__(params, lr=1e-5)
        raise RuntimeError("after the groups exist")


def test_a_subclass_that_raises(said):
    before = torch.optim.Optimizer.__init__
    watch = Watch(Plan("precision_policy=on", fix="x=float32"))
    watch.arm()
    with pytest.raises(RuntimeError, match="after the groups"):
        Broken(weights())
    torch.optim.AdamW(weights(), lr=1e-5)
    watch.disarm()
    assert len(said()) == 1
    assert torch.optim.Optimizer.__init__ is before


def test_what_a_job_taken_for_peft_holds(caplog):
    """Once, at the first step, in numbers; no warning."""
    caplog.set_level(logging.INFO, "precision_policy")
    watch = Watch(Plan("precision_policy=on", action="count"))
    watch.arm()
    try:
        for _ in range(2):
            step(torch.optim.AdamW(weights(), lr=1e-5))
    finally:
        watch.disarm()
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "trains 1 trainable tensor, 16 elements, of these 16 elements stored in bf16" in record.getMessage()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(1e-5), 1e-5])
def test_odd_learning_rates(armed, said, lr):
    torch.optim.AdamW(weights(), lr=lr)
    (text,) = said()
    assert "100.0% of updates round away at lr 1e-05" in text


def test_meta_parameters(armed, said):
    """They hold no values to estimate from; the warning comes without that table."""
    params = [torch.nn.Parameter(torch.ones(4, device="meta", dtype=torch.bfloat16))]
    torch.optim.AdamW(params, lr=1e-5)
    (text,) = said()
    assert "weights that an update cannot move" not in text
    assert "1 trainable tensor (4 elements) stored in bf16" in text


def test_a_failure_of_ours_ends_no_job(armed, said, monkeypatch, caplog):
    monkeypatch.setattr("precision_policy.job.message.low_precision", lambda *a: 1 / 0)
    torch.optim.AdamW(weights(), lr=1e-5)
    (text,) = said()
    assert "could not be judged" in text
    assert caplog.records[0].exc_info is not None  # the traceback is in the log


def test_job_that_insists_on_bf16(app):
    """The override that fixes it is spelled for this application, with a + where Hydra wants one."""
    run = app()("+precision_policy=on", "model.torch_dtype=bfloat16")
    assert "fix: model.torch_dtype=float32" in run.out
    assert run.out.count("[precision_policy][WARNING]") == 1
    run = app(CONFIG.replace("torch_dtype: auto", "name: x"), folder="plus")(
        "+precision_policy=on", "+model.torch_dtype=bfloat16"
    )
    assert "fix: +model.torch_dtype=float32" in run.out


def test_strict_stops_the_job(app):
    """Exit status 1, with the numbers."""
    run = app()("+precision_policy=strict", "model.torch_dtype=bfloat16", status=1)
    assert "Bf16AdamError: precision_policy=strict: torch.optim.AdamW over bf16 weights" in run.err
    assert run.err.count("weights that an update cannot move") == 0
    assert run.out.count("weights that an update cannot move") == 1
    assert "\n  fix: model.torch_dtype=float32" in run.err
    assert app(folder="fine")("+precision_policy=strict").config["model"] == {"torch_dtype": "float32"}


@pytest.mark.parametrize("arguments", [["+peft=true"], ["precision_policy.bf16_adam=ignore"]])
def test_silent_jobs(app, arguments):
    assert "WARNING" not in app()("+precision_policy=on", "model.torch_dtype=bfloat16", *arguments).log


FAULTS = """
import hydra, torch
from torch.optim import Optimizer
before = Optimizer.__init__
import sys
sys.argv += ["+precision_policy=on", "hydra.run.dir=out"]
for error in (KeyboardInterrupt, SystemExit, ValueError, None):
    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def main(cfg):
        assert Optimizer.__init__ is not before
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
        if error:
            raise error
    try:
        main()
    except BaseException as caught:
        print("CAUGHT", type(caught).__name__)
    assert Optimizer.__init__ is before, error
print("CLEAN")
"""


def test_faults_leave_torch_as_it_was(app):
    """Also a KeyboardInterrupt, of which Hydra 1.3 tells no callback."""
    run = app(code=FAULTS)()
    assert run.out.endswith("CLEAN\n")
    assert run.out.count("[precision_policy][WARNING]") == 4
