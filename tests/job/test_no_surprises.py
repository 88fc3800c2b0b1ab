"""Settings, the monitor, wrong lines and the warning, as a newcomer meets them."""

import logging
import sys
import types

import pytest
import torch
from conftest import CONFIG
from torch import nn

from precision_policy.job.monitor import Monitor
from precision_policy.job.plan import Plan
from precision_policy.job.watch import Bf16AdamError, Watch

ON = Plan("precision_policy=on", fix="net.dtype=float32")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "precision_policy")
    return lambda level="WARNING": [r.getMessage() for r in caplog.records if r.levelname == level]


@pytest.fixture
def armed():
    watches = []

    def arm(plan=ON):
        watch = Watch(plan)
        watch.arm()
        watches.append(watch)
        return watch

    yield arm
    for watch in watches:
        watch.disarm()


@pytest.fixture
def monitored():
    monitor = Monitor(1, "precision_policy=on")
    monitor.start()
    yield monitor
    monitor.stop()


def bf16(*size):
    return nn.Parameter((torch.randn(*size or (64, 64)) * 0.02).to(torch.bfloat16))


@pytest.mark.once
def test_the_monitor_where_the_step_adds_a_group(monitored, said):
    class Adds(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.add_param_group({"params": [bf16()]})

    weights = bf16()
    weights.grad = torch.ones_like(weights)
    optimizer = Adds([weights], lr=1.0)
    optimizer.step()
    optimizer.step()
    assert said() == []
    assert len(said("INFO")) == 2


@pytest.mark.once
def test_the_monitor_counts_all_parameters_of_a_group(monitored, said):
    params = [bf16(), bf16(8), nn.Parameter(torch.empty(4, 4, device="meta"))]
    for param in params[:2]:
        param.grad = torch.ones_like(param)
    torch.optim.SGD(params, lr=1.0).step()
    assert "a sample of 4104 weights" in said("INFO")[0]


class Refuses(torch.Tensor):
    """A weight of a tensor subclass whose values cannot be viewed."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.view, torch.Tensor.is_contiguous):
            raise TypeError("no views of me")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.once
def test_the_monitor_with_a_tensor_subclass(monitored, said):
    """It reports what it can read, and leaves out what refuses."""
    odd = nn.Parameter(torch.randn(8, 8).as_subclass(Refuses))
    plain = bf16()
    for param in (odd, plain):
        param.grad = torch.ones_like(param)
    torch.optim.SGD([odd, plain], lr=1.0).step()
    assert "a sample of 4096 weights" in said("INFO")[0]


@pytest.mark.once
def test_the_monitor_never_ends_a_job(monitored, said, monkeypatch, caplog):
    monkeypatch.setattr("precision_policy.job.monitor._sample", lambda groups: 1 / 0)
    weights = bf16()
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.SGD([weights], lr=1.0)
    optimizer.step()
    optimizer.step()
    assert said() == ["precision_policy=on: the monitor could not read a step; the job goes on"]
    assert caplog.records[0].exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("arguments", [["precision_policy.bf16_adam=ignore"], ["+peft=true", "precision_policy.peft=peft"]])
def test_the_monitor_works_where_the_warning_is_silenced(app, arguments):
    run = app()("+precision_policy=on", "model.torch_dtype=bfloat16", "precision_policy.monitor.every=1", *arguments)
    assert "step 1: 100.0% of a sample of 64 weights left unchanged" in run.log


@pytest.mark.once
def test_the_watch_is_guarded_whole(said, monkeypatch):
    """The removal of its hooks included."""
    watch = Watch(ON)
    before = torch.optim.Optimizer.__init__
    watch.arm()
    watch._undo.append(lambda: 1 / 0)
    watch.disarm()
    assert torch.optim.Optimizer.__init__ is before
    assert len(said()) == 1


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("precision_policy.storage_dtype=32", "model.torch_dtype", 32),
        ("precision_policy.sample=1e6", "precision_policy.sample", 1_000_000),
    ],
)
def test_numbers_as_people_type_them(compose, override, key, value):
    from omegaconf import OmegaConf

    assert OmegaConf.select(compose(CONFIG, "+precision_policy=on", override), key) == value


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        ("net: {torch_dtype: auto}", "precision_policy.model=nett", "Did you mean precision_policy.model=net?"),
        ("model: {dtype: bfloat16}", "precision_policy.dtype_key=dtpye", "Did you mean precision_policy.dtype_key=dtype?"),
        (
            "model: {dtype: auto}\ntraining: {opt: adamw}",
            "precision_policy.optimizer=training.otp",
            "precision_policy.optimizer=training.opt?",
        ),
        ("model: {args: {}}", "precision_policy.dtype_key=agrs.dtype", "Did you mean precision_policy.dtype_key=args.dtype?"),
        (
            "model: {args: {dtype: bfloat16}}",
            "precision_policy.dtype_key=args.dtpye",
            "model.args has no dtpye.\nDid you mean precision_policy.dtype_key=args.dtype?",
        ),
    ],
)
def test_did_you_mean(app, config, override, words):
    run = app(f"{config}\noptimizer: {{_target_: torch.optim.AdamW}}")("+precision_policy=on", override, status=1)
    assert words in run.err
    assert "Traceback" not in run.err


WRONG = [
    (["+precision_policy=true"], "+precision_policy=true: the policy is an option of a config group"),
    (["+precision_policy=1"], "+precision_policy=1: the policy is an option of a config group"),
    (["+precision_policy=on", "+precision_policy.decision.rule=set"], "precision_policy.decision="),
]


@pytest.mark.parametrize("multirun", [[], ["--multirun"]], ids=["run", "sweep"])
@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_no_traceback_for_a_wrong_line(app, multirun, arguments, words):
    run = app()(*multirun, *arguments, status=1)
    assert words in run.err
    assert "Traceback" not in run.err
    assert "CONFIG" not in run.out


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_the_same_in_the_compose_api(compose, arguments, words):
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException) as error:
        compose(CONFIG, *arguments)
    assert words in str(error.value)


def test_an_unquoted_on_elsewhere(app, compose):
    """In an experiment's defaults list, in a sweep, and in the Compose API."""
    from hydra.errors import ConfigCompositionException

    train = app("defaults:\n  - experiment: null\n  - _self_\n" + CONFIG)
    train.write("conf/experiment/full.yaml", "# @package _global_\ndefaults:\n  - override /precision_policy: on\n")
    for arguments in (["experiment=full"], ["--multirun", "experiment=full"]):
        run = train(*arguments, status=1)
        assert "override /precision_policy: true is no option of the policy" in run.err
        assert "Traceback" not in run.err
    with pytest.raises(ConfigCompositionException, match="quoted, in a defaults list"):
        compose("defaults:\n  - precision_policy: on\n  - _self_\n")


def test_an_explicit_on_that_does_nothing(app):
    """Nothing found: a WARNING with the line to paste. Nothing needed: an INFO."""
    run = app("net: {torch_dtype: auto}\noptimizer: {_target_: torch.optim.AdamW, _partial_: true}\nmodel: null")(
        "+precision_policy=on"
    )
    assert run.log.startswith("WARNING precision_policy=on: nothing set (no_model)")
    assert "add: precision_policy.model=net" in run.log.splitlines()[0]
    assert "fix: precision_policy.model=net" in run.out
    for arguments in (["+peft=true"], ["model.torch_dtype=float32"], ["optimizer._target_=optimi.AdamW"]):
        assert app(folder=arguments[0].replace(".", "").replace("=", ""))(
            "+precision_policy=on", *arguments, status=None
        ).log.startswith("INFO")


@pytest.mark.once
@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"lr": 0.0}, "at lr 1e-05 (assumed; lr is 0 now)"),
        ({"lr": 0.0, "initial_lr": 3e-6}, "at lr 3e-06 (initial_lr; lr is 0 now)"),
        ({"lr": torch.tensor(1e-5)}, "at lr 1e-05"),
    ],
)
def test_the_learning_rate_that_the_figures_are_for(armed, said, group, words):
    armed()
    torch.optim.AdamW([{"params": [bf16()], **group}])
    first, _, _, _, head, *_ = said()[0].splitlines()
    assert words in first
    assert words in head


@pytest.mark.once
def test_it_reads_top_down(armed, said):
    """What happens, the fix, the other way out; then the table."""
    armed()
    torch.optim.AdamW([bf16()], lr=1e-5)
    lines = said()[0].splitlines()
    starts = [
        "precision_policy=on: torch.optim.AdamW over",
        "  fix: ",
        "  or keep bf16",
        "  1 trainable tensor (4,096",
        "  weights that",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=False)] == starts
    assert " %" not in said()[0]


@pytest.mark.once
@pytest.mark.parametrize("name", ["NAdam", "Adamax", "RAdam", "Adafactor", "Muon"])
def test_more_of_torchs_own(armed, said, name):
    """Warned about; with the share where the first update is of known size, without one elsewhere."""
    kind = getattr(torch.optim, name, None)
    if kind is None:
        pytest.skip("a newer torch has it")
    armed()
    kind([bf16()], lr=1e-5)
    (text,) = said()
    assert f"torch.optim.{name} over bf16 weights, no fp32 master copy: " in text
    assert ("% of updates round away at lr 1e-05" in text) is (name in ("NAdam", "Adamax"))
    assert ("updates under half a bf16 step of a weight round away" in text) is (name not in ("NAdam", "Adamax"))


@pytest.mark.once
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Adamax])
@pytest.mark.parametrize("lr", [3e-6, 1e-5, 1e-4, 3e-4])
def test_their_first_step(kind, lr, foreach):
    """The share that the warning gives is within half a point of what a real first step leaves unchanged."""
    from precision_policy import lost_updates

    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(300_000, generator=generator) * 0.02).to(torch.bfloat16)
    param = nn.Parameter(weights.clone())
    param.grad = torch.randn(300_000, generator=generator).to(torch.bfloat16)
    (group,) = lost_updates([{"params": [param], "lr": lr}])
    kind([param], lr=lr, foreach=foreach).step()
    assert group.lost == pytest.approx((param.data == weights).double().mean().item(), abs=0.005)


@pytest.mark.once
@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_strict_waits_for_an_engine(armed, monkeypatch, engine):
    """Mocked: a module of the engine's name. Real DeepSpeed is in test_heavy.py."""
    armed(Plan("precision_policy=strict", action="error"))
    with pytest.raises(Bf16AdamError):
        torch.optim.AdamW([bf16()], lr=1e-5)
    monkeypatch.setitem(sys.modules, engine, types.ModuleType(engine))
    swapped = torch.optim.AdamW([bf16()], lr=1e-5)
    swapped.param_groups[0]["params"] = [nn.Parameter(torch.ones(4))]
    swapped.step()
    kept = torch.optim.AdamW([bf16()], lr=1e-5)
    with pytest.raises(Bf16AdamError):
        kept.step()
