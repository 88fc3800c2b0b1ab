"""Which optimizers are warned of, when, and which stop the job."""

import copy
import pickle
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch
from jobs import CHOSEN, NO_MODEL, PEFT, SET, Kept, normal, record, step, weights
from words import LOST

from precision_policy.job.storage import Bf16AdamError
from precision_policy.job.words import FP16

pytest_plugins = ["armed_job"]
pytestmark = pytest.mark.once

STRICT = record(bf16_adam="error")


class Mine(torch.optim.AdamW):
    pass


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, Mine])
def test_adam_and_subclasses(armed, said, kind):
    kind(weights(), lr=1e-5)
    assert len(said()) == 1


OF_TORCH = ["NAdam", "Adamax", "RAdam", "Adafactor", "Muon", "SGD", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "LBFGS"]


@pytest.mark.parametrize("name", [*OF_TORCH, "SparseAdam"])
def test_all_of_torch_optim(arm, said, name):
    """Warned about, and refused by strict; with the share where the first update is of known size, without one elsewhere."""
    kind = getattr(torch.optim, name, None)
    if kind is None:
        pytest.skip("a newer torch has it")
    arm()
    kind([normal()], lr=1e-5)
    (text,) = said()
    assert f"torch.optim.{name} over bf16 weights, no fp32 master copy: " in text
    assert ("% of updates round away at lr 1e-05" in text) is (name in ("NAdam", "Adamax"))
    assert ("updates under half a bf16 step of a weight round away" in text) is (name not in ("NAdam", "Adamax"))
    arm(STRICT)
    with pytest.raises(Bf16AdamError, match=name):
        kind([normal()], lr=1e-5)


class FromElsewhere(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 1e-5})

    def step(self, closure=None):
        pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: FromElsewhere(weights()),
        lambda: torch.optim.AdamW(weights(torch.float32), lr=1e-5),
        lambda: torch.optim.AdamW(weights(torch.float16), lr=1e-5),
        lambda: torch.optim.AdamW(weights(requires_grad=False) + weights(torch.float32), lr=1e-5),
    ],
)
@pytest.mark.parametrize("action", ["warn", "error"])
def test_no_warning(arm, said, make, action):
    arm(record(bf16_adam=action))
    step(make())
    assert said() + said("ERROR") == []


def test_ignore(arm, said):
    """Only the confirmation is left."""
    arm(record(bf16_adam="ignore"))
    for _ in range(2):
        step(torch.optim.AdamW(weights(), lr=1e-5))
    assert said() == []
    assert len(said("INFO")) == 1


def test_once_per_job(armed, said):
    for _ in range(3):
        step(torch.optim.AdamW(weights(), lr=1e-5))
    assert len(said()) == 1


def test_a_second_job_warns_again(arm, said):
    for _ in range(2):
        stack = arm()
        torch.optim.AdamW(weights(), lr=1e-5)
        stack.close()
        torch.optim.AdamW(weights(), lr=1e-5)
    assert len(said()) == 2


def test_two_jobs_at_once(armed, arm, said):
    """A job inside a job: each says its own, neither trips over the other's hooks, and none of those stay."""
    inner = arm()
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    inner.close()
    for _ in range(3):
        step(optimizer)
    assert len(said()) == 2
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_many_tensors_and_one_low(armed, said):
    """Beyond what construction looks at, the first step finds it."""
    optimizer = torch.optim.AdamW([*weights(torch.float32, 2000), *weights()], lr=1e-5)
    assert said() == []
    step(optimizer)
    assert len(said()) == 1


@pytest.mark.parametrize("count", [1024, 1000, 1500])
def test_alternating_layers(armed, said, count):
    """Every second tensor in bf16 is seen at construction."""
    params = [p for _ in range(count) for p in (*weights(torch.float32), *weights())]
    torch.optim.AdamW(params, lr=1e-5)
    assert len(said()) == 1


def test_parameters_that_come_later(armed, said):
    """A group added between construction and the first step counts."""
    optimizer = torch.optim.AdamW(weights(torch.float32), lr=1e-5)
    optimizer.add_param_group({"params": weights()})
    step(optimizer)
    assert len(said()) == 1


def test_engine_swaps_fp32_in(armed, said):
    """What DeepSpeed and Megatron do between construction and the first step takes the warning back, and another may come."""
    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    optimizer.param_groups[0]["params"] = weights(torch.float32)
    step(optimizer)
    assert len(said()) == 1
    (taken_back, confirmed) = said("INFO")
    assert "warning taken back: at its first step torch.optim.AdamW holds no trainable bf16 parameters any more" in taken_back
    assert "stored in fp32 copies that an engine has made of bf16 weights, updated in fp32" in confirmed
    torch.optim.AdamW(weights(), lr=1e-5)
    assert len(said()) == 2


def test_an_optimizer_that_is_constructed_again(armed, said):
    """It starts anew: nothing is taken back of a warning that was about its first construction."""
    optimizer = torch.optim.AdamW(weights())
    optimizer.__init__(weights(torch.float32))
    step(optimizer)
    assert not any("taken back" in line for line in said("INFO"))


def test_what_is_remembered_of_an_optimizer_goes_with_it(armed):
    """Nothing keeps an optimizer, or its weights, alive."""
    import gc
    import weakref

    optimizer = torch.optim.AdamW(weights(), lr=1e-5)
    step(optimizer)
    seen, weight = weakref.ref(optimizer), weakref.ref(optimizer.param_groups[0]["params"][0])
    del optimizer
    gc.collect()
    assert seen() is None
    assert weight() is None


def test_copies(armed, said):
    """An optimizer that is deep-copied or pickled works, and nothing is warned twice."""
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


def test_a_subclass_that_raises(arm, said):
    before = torch.optim.Optimizer.__init__
    stack = arm()
    with pytest.raises(RuntimeError, match="after the groups"):
        Broken(weights())
    torch.optim.AdamW(weights(), lr=1e-5)
    stack.close()
    assert len(said()) == 1
    assert torch.optim.Optimizer.__init__ is before


def test_a_failure_of_ours_ends_no_job(armed, said, monkeypatch, caplog):
    monkeypatch.setattr("precision_policy.job.holdings.bf16_groups", lambda *a: 1 / 0)
    torch.optim.AdamW(weights(), lr=1e-5)
    (text,) = said()
    assert "could not be judged" in text
    assert caplog.records[0].exc_info is not None  # the traceback is in the log


# Next to nothing lost.


def test_a_share_of_nearly_nothing(armed, said):
    """An INFO, which takes nobody's turn: the next optimizer is warned of."""
    torch.optim.AdamW(weights(), lr=0.1)
    assert "0.0% of updates round away at lr 0.1" in said("INFO")[0]
    assert said() == []
    torch.optim.AdamW(weights(), lr=1e-5)
    (text,) = said()
    assert "100.0% of updates round away at lr 1e-05" in text


def test_strict_refuses_a_share_of_nearly_nothing(arm, said):
    """And says at which rate more is lost; the table is an ERROR."""
    arm(STRICT, "precision_policy=strict")
    with pytest.raises(Bf16AdamError, match=r"0\.0% of updates round away at lr 0\.1; below lr 0\.004 a tenth would"):
        torch.optim.AdamW(weights(), lr=0.1)
    assert "weights that an update cannot move" in said("ERROR")[0]


def test_strict_raises(arm, said):
    """The error has the fix on a line of its own, and is readable where it is shown by its repr."""
    arm(STRICT, "precision_policy=strict")
    with pytest.raises(Bf16AdamError, match=r"\n    precision_policy\.master_weights=true\n") as error:
        torch.optim.AdamW(weights(), lr=1e-5)
    assert repr(error.value) == f"Bf16AdamError: {error.value}"
    assert "weights that an update cannot move" not in str(error.value)
    for _ in range(2):
        with pytest.raises(Bf16AdamError):
            torch.optim.SGD(weights(), lr=1e-5)
    assert len(said("ERROR")) == 1


def test_strict_raises_on_every_rank(arm, said, monkeypatch):
    """Or the others would wait for ever for the one that stopped."""
    monkeypatch.setenv("RANK", "1")
    arm(STRICT)
    with pytest.raises(Bf16AdamError):
        torch.optim.AdamW(weights(), lr=1e-5)
    assert said("ERROR") == []


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_strict_waits_for_an_engine(arm, monkeypatch, engine):
    """Mocked: a module of the engine's name. Real DeepSpeed is in test_heavy.py."""
    arm(STRICT)
    with pytest.raises(Bf16AdamError):
        torch.optim.AdamW([normal()], lr=1e-5)
    monkeypatch.setitem(sys.modules, engine, types.ModuleType(engine))
    swapped = torch.optim.AdamW([normal()], lr=1e-5)
    swapped.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(4))]
    swapped.step()
    kept = torch.optim.AdamW([normal()], lr=1e-5)
    with pytest.raises(Bf16AdamError):
        kept.step()


# fp32 that was asked for.


def linear(dtype=torch.bfloat16):
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).to(dtype)


@pytest.mark.newest
def test_asked_for_and_not_arrived(arm, said):
    """Certain at the first step of a job with one optimizer; at its construction, another may still come."""
    arm(record(SET))
    optimizer = torch.optim.AdamW(linear().named_parameters(), lr=1e-5)
    (text,) = said()
    assert "asked for fp32" not in text
    assert "if these weights are meant by model.dtype=float32: something recast the model" in text
    step(optimizer)
    assert len(said()) == 1
    assert said("INFO")[0] == (
        "precision_policy=on: model.dtype=float32 asked for fp32 storage, but 4 of 4 tensors came in bf16 "
        "(0.weight, 0.bias, 1.weight): something recast the model: look for .to(torch.bfloat16), .bfloat16() or a "
        "bf16-true precision setting"
    )


def test_asked_for_and_not_arrived_in_part_under_an_unknown_optimizer(arm, said):
    """A WARNING where none was given; one tensor of two is in bf16."""
    arm(record(SET))
    step(FromElsewhere([*weights(), *weights(torch.float32)]))
    assert ["asked for fp32 storage, but 1 of 2 tensors came in bf16: " in line for line in said()] == [True]


@pytest.mark.parametrize("first", ["actor", "critic"])
def test_asked_for_by_one_of_two_models(arm, said, first):
    """The other is told by itself, whichever comes first, and how it can be named."""
    arm(record(SET))
    makers = {"actor": lambda: linear(torch.float32), "critic": linear}
    order = ["actor", "critic"] if first == "actor" else ["critic", "actor"]
    optimizers = [torch.optim.AdamW(makers[name]().parameters(), lr=1e-5) for name in order]
    for optimizer in optimizers:
        step(optimizer)
    (text,) = said()
    assert "4 trainable tensors (28 elements) stored in bf16" in text
    assert "precision_policy.pairs can name further models" in text
    assert "asked for fp32" not in text + "".join(said("INFO"))


# Several optimizers.


def test_the_sum_of_several(armed, said):
    """One line at the job's first step; a WARNING, since one is worse than what was said. Shared parameters count once."""
    shared = [torch.nn.Parameter(torch.full((4, 4), 0.001).to(torch.bfloat16)), *weights()]
    optimizers = [torch.optim.AdamW(shared, lr=1e-5), torch.optim.Adam(weights(count=2), lr=1e-5)]
    optimizers.append(torch.optim.SGD([shared[0]], lr=1e-5))
    optimizers.append(torch.optim.AdamW(weights(torch.float32), lr=1e-5))
    for _ in range(2):
        for optimizer in optimizers:
            step(optimizer)
    first, summed_up = said()
    assert "50.0% of updates round away at lr 1e-05" in first
    assert summed_up == (
        "precision_policy=on: 3 optimizers over bf16 weights, no fp32 master copy: 4 trainable tensors (64 elements) stored in "
        "bf16; at worst 100.0% of updates round away at lr 1e-05, by torch.optim.Adam"
    )


def test_the_sum_that_is_no_worse(armed, said):
    """An INFO: the job was warned of that share."""
    for optimizer in [torch.optim.AdamW(weights(), lr=1e-5) for _ in range(3)]:
        step(optimizer)
    assert len(said()) == 1
    assert "3 optimizers over bf16 weights" in said("INFO")[0]


def test_the_sum_without_shares(armed, said):
    for optimizer in [torch.optim.SGD(weights(), lr=1e-5) for _ in range(2)]:
        step(optimizer)
    assert "(32 elements) stored in bf16; updates under half a bf16 step of a weight round away" in said("INFO")[0]


def test_no_sum_for_one_that_loses(armed, said):
    """Beside fp32 the one was warned of with its own figures."""
    for optimizer in [torch.optim.AdamW(weights(), lr=1e-5), torch.optim.AdamW(weights(torch.float32), lr=1e-5)]:
        step(optimizer)
    assert not any("optimizers over bf16 weights" in line for line in said() + said("INFO"))


# Adapters.


@pytest.mark.parametrize("rule", ["peft", "quantized"])
@pytest.mark.parametrize("action", ["warn", "error"])
def test_adapters_stop_no_job(arm, said, rule, action):
    """Once, at the first step, with their share: a full fine-tune mistaken for PEFT shows in it."""
    arm(record(replace(PEFT, rule=rule), bf16_adam=action))
    for _ in range(2):
        step(torch.optim.AdamW(weights(), lr=1e-5))
    assert said() + said("ERROR") == []
    told = said("INFO")[0]
    assert told == (
        f"precision_policy=on: {LOST}, no fp32 master copy: 100.0% of updates round away at lr 1e-05; "
        "1 trainable tensor (16 elements) stored in bf16; left as it is, since the config has "
        + ("PEFT" if rule == "peft" else "a quantized model")
    )
    assert len(said("INFO")) == 2


class Adapted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)
        self.adapter = torch.nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x):
        return self.adapter(self.base(x))


def train(model, make=torch.optim.AdamW):
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


def test_of_two_models_the_one_with_adapters_stops_no_job(arm, said):
    """Whose parameters an optimizer has is seen in its first step, and strict waits for that."""
    arm(record(PEFT, CHOSEN, bf16_adam="error"))
    train(Adapted())
    assert said("ERROR") == []
    assert "left as it is, since the config has PEFT" in said("INFO")[0]
    with pytest.raises(Bf16AdamError):
        train(linear())


def test_where_nobody_can_tell_whether_they_are_adapters(arm, said):
    """No module was seen called: a WARNING, which says why strict does not stop."""
    arm(record(PEFT, CHOSEN, bf16_adam="error"), "precision_policy=strict")
    step(torch.optim.AdamW(weights(), lr=1e-5))
    (text,) = said()
    assert text.splitlines()[-1].startswith("  precision_policy=strict does not stop here: one of the models has PEFT")


# Master weights.


def test_what_has_master_weights_is_not_warned_of(arm, said, masters):
    masters.kept = lambda optimizer: Kept(1, 16, 96)
    arm(record(NO_MODEL, master_weights=True, bf16_adam="error"), "precision_policy=master_weights")
    step(torch.optim.AdamW(weights(), lr=1e-5))
    assert said() + said("ERROR") == []


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (None, "no master weights for 2 tensors: the step never came through a class of torch.optim: 100.0% of updates"),
        (Kept(0, 0, 0, {"sparse gradients": 2}), "no master weights for 2 tensors: sparse gradients: 100.0% of updates"),
        (Kept(1, 16, 96, {"a reason": 1}), "no master weights for 1 tensor: a reason: small updates of these round away"),
    ],
)
def test_what_is_refused_master_weights(arm, said, masters, kept, words):
    """Warned of at the first step, with the reason; strict stops there and not before."""
    masters.kept = lambda optimizer: kept
    arm(record(master_weights=True))
    optimizer = torch.optim.AdamW(weights(count=2), lr=1e-5)
    assert said() == []
    step(optimizer)
    (text,) = said()
    assert text.startswith(f"precision_policy=on: {LOST}, {words}")
    arm(record(master_weights=True, bf16_adam="error"))
    strict = torch.optim.AdamW(weights(count=2), lr=1e-5)
    with pytest.raises(Bf16AdamError, match="no master weights for"):
        step(strict)


def test_the_reason_of_fp16_is_none_of_bf16s(arm, said, masters):
    """A bf16 parameter that has no gradient, beside fp16 ones: nothing of it is lost."""
    masters.kept = lambda optimizer: Kept(1, 16, 96, {FP16: 1})
    arm(record(master_weights=True, bf16_adam="error"))
    step(torch.optim.AdamW([*weights(count=2), *weights(torch.float16)], lr=1e-5))
    assert said() + said("ERROR") == []


def test_refused_adapters_stop_no_job(arm, said, masters):
    arm(record(PEFT, master_weights=True, bf16_adam="error"))
    step(torch.optim.AdamW(weights(), lr=1e-5))
    assert said() + said("ERROR") == []
    assert "left as it is" in said("INFO")[0]


def test_without_gradients_nothing_is_refused(arm, said, masters):
    masters.kept = lambda optimizer: Kept(0, 0, 0)
    arm(record(master_weights=True, bf16_adam="error"))
    torch.optim.AdamW(weights(), lr=1e-5).step()
    assert said() + said("ERROR") == []


# In a job.


def test_job_that_insists_on_bf16(application):
    """The override that fixes it is spelled for this application, with a + where Hydra wants one, on a line of its own."""
    train = application("bf16_weight")
    run = train("+precision_policy=on", "model.torch_dtype=bfloat16")
    assert "\n    model.torch_dtype=float32\n" in run.out
    assert run.out.count("[precision_policy][WARNING]") == 1
    run = train("--config-name", "no_dtype_key", "+precision_policy=on", "+model.torch_dtype=bfloat16")
    assert "\n    +model.torch_dtype=float32\n" in run.out


def test_strict_stops_the_job(application):
    """Exit status 1, with the numbers."""
    train = application("bf16_weight")
    run = train("+precision_policy=strict", "model.torch_dtype=bfloat16", status=1)
    assert f"Bf16AdamError: precision_policy=strict: {LOST}" in run.err
    assert run.err.count("weights that an update cannot move") == 0
    assert run.out.count("weights that an update cannot move") == 1
    assert "\n    model.torch_dtype=float32\n" in run.err
    assert train("+precision_policy=strict").config["model"] == {"torch_dtype": "float32"}


def test_a_job_of_two_optimizers(application):
    """The head loses nothing and the body everything: it is warned of."""
    run = application("optimizers")("+precision_policy=on")
    first, second = [line for line in run.log.splitlines() if "no fp32 master copy: " in line and "optimizers" not in line]
    assert first.startswith("INFO")
    assert "0.0% of updates round away at lr 0.1" in first
    assert second.startswith("WARNING")
    assert "99.2% of updates round away at lr 1e-06" in second


def test_a_job_of_an_optimizer_for_each_parameter(application):
    """Stepped in backward: the first is warned of with its own figures, the sum follows at the first step of any."""
    run = application("in_backward")("+precision_policy=on")
    assert "\n  1 trainable tensor (4,096 elements) stored in bf16\n" in run.out
    assert (
        "40 optimizers over bf16 weights, no fp32 master copy: 40 trainable tensors (83,200 elements) stored in bf16" in run.log
    )
    assert "40 trainable tensors, 83,200 elements in 40 optimizers: stored in bf16, updated in bf16" in run.log


def test_lazy_parameters(armed, said):
    """They have no elements when their optimizer is made; they are looked at like any others, and nothing fails."""
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert said() == []
    assert said("INFO")[-1].startswith("precision_policy=on: 4 trainable tensors, 36 elements: stored in fp32")
