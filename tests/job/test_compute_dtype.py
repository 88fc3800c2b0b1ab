"""The compute dtype: read off the first gradients, said once, and bf16 supplied where it was asked for."""

import copy
import gc
import io
import logging
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_frameworks import ACCELERATE, HEAD, LIGHTNING, LIGHTNING_CONFIG, LOAD, LOOP, TRAINER
from torch import nn

from precision_policy.job import compensating, compute_dtype
from precision_policy.job.compute_dtype import LowBits, computed_in, in_fp32, low_bits
from precision_policy.job.plan import Plan
from precision_policy.job.watch import Watch

pytestmark = pytest.mark.once
ON = Plan("precision_policy=on", confirms=True, set_over_checkpoint=True)
MIXED = Plan("precision_policy=mixed", confirms=True, compute_dtype="bfloat16")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "precision_policy")
    return lambda level="INFO": [r.getMessage() for r in caplog.records if r.levelname == level]


@pytest.fixture
def watch():
    watches = []

    def arm(plan=MIXED):
        one = Watch(plan)
        one.arm()
        watches.append(one)
        return one

    before = nn.Module.__call__, nn.Module.compile
    yield arm
    for one in watches:
        one.disarm()
    assert (nn.Module.__call__, nn.Module.compile) == before


class Network(nn.Sequential):
    """torch.compile leaves a module of torch's own, called by itself, as it is."""

    def forward(self, x):
        return super().forward(x)


def network(seed=0):
    torch.manual_seed(seed)
    return Network(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))


def batch(seed=1):
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps=3, call=None):
    losses = []
    for number in range(steps):
        loss = (call or model)(batch(number)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-6, 1e3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_low_bits_of_known_formats(seed, scale, dtype):
    """A gradient that was rounded to a format on its way is told; one that was not, too."""
    gradient = torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)) * scale
    limits = torch.finfo(dtype)
    if dtype is torch.float16:  # numbers that the format holds with all of its bits
        gradient = gradient.sign() * gradient.abs().clamp(limits.tiny, limits.max / 2)
    rounded = gradient.to(dtype).float()
    told = computed_in([LowBits(*low_bits(rounded).tolist())])
    expected = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    few = len(rounded.flatten()[:: max(1, rounded.numel() // 2048)].abs().unique()) < 32
    assert told == (None if few else expected)


@pytest.mark.parametrize(
    "gradient", [torch.zeros(64, 64), torch.ones(64, 64), torch.randint(-9, 9, (64, 64)).float(), torch.randn(4, 4)]
)
def test_low_bits_that_tell_nothing(gradient):
    """Zeros, small integers and tiny matrices look the same in every format."""
    assert computed_in([LowBits(*low_bits(gradient).tolist())]) is None


def test_the_clearest_matrix_decides():
    """An embedding shared with the head shows the sum of two gradients; another matrix tells."""
    shared, clear = LowBits(1000, 770, 780, 900), LowBits(1000, 1000, 1000, 200)
    assert computed_in([shared]) is None
    assert computed_in([shared, clear]) == "bf16"
    assert computed_in([LowBits(1000, 400, 1000, 900)]) == "fp16"
    assert computed_in([LowBits(1000, 0, 1, 900)]) == "fp32"


@pytest.mark.parametrize(("autocast", "computed"), [(None, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_said_at_the_first_step(watch, said, autocast, computed):
    """One line; nothing is left on parameters, modules or the optimizer."""
    watch(ON)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def call(x):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return model(x)

    train(model, optimizer, call=call)
    line = f"precision_policy=on: 6 trainable tensors, 8,448 elements: stored in fp32, computed in {computed}"
    assert said() == [line]
    assert said("WARNING") == []  # a CPU has no matrix units for bf16
    assert not any(p._backward_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_closure_computes_within_the_step(watch, said):
    watch(ON)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def closure():
        loss = model(batch()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert said()[0].endswith("computed in fp32")


def test_gradients_by_hand_tell_storage_alone(watch, said):
    watch(ON)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert said() == ["precision_policy=on: 6 trainable tensors, 8,448 elements: stored in fp32"]


def test_a_further_optimizer_only_where_it_differs(watch, said):
    watch(ON)
    for _ in range(2):
        model = network()
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert len(said()) == 1
    mixed = network()
    mixed[0].to(torch.float64)
    mixed[0].register_forward_pre_hook(lambda m, a: a[0].double())
    mixed[0].register_forward_hook(lambda m, a, out: out.float())
    train(mixed, torch.optim.AdamW(mixed.parameters(), lr=1e-3))
    assert len(said()) == 2
    assert "stored in fp32 (4) and float64 (2)" in said()[1]


def test_tf32_costs_less(watch, said, monkeypatch):
    """Mocked: a GPU's name, and torch's switch as a GPU reads it."""
    monkeypatch.setattr("precision_policy.job.compute_dtype.bf16_device", lambda device: "Some GPU")
    monkeypatch.setattr("precision_policy.job.compute_dtype.fp32_or_tf32", lambda computed, device: "TF32")
    watch(ON)
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert said()[0].endswith("computed in TF32")
    assert "computed in TF32 on Some GPU: about 3 times slower" in said("WARNING")[0]


def test_no_word_on_weights_that_are_not_fp32_nor_on_other_ranks(watch, said, monkeypatch):
    watch(ON)
    low = network().bfloat16()
    low(batch().bfloat16()).float().square().mean().backward()
    torch.optim.SGD(low.parameters(), lr=1e-3).step()
    monkeypatch.setenv("RANK", "1")
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert said() == []


def test_the_cost_is_said_where_the_policy_made_it(watch, said, monkeypatch):
    """Mocked: a device with matrix units for bf16, which no machine of CI has. The rest of the path is real."""
    monkeypatch.setattr("precision_policy.job.compute_dtype.bf16_device", lambda device: "Some GPU")
    watch(ON)
    for _ in range(2):
        model = network()
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    (text,) = said("WARNING")
    first, fix, *_ = text.splitlines()
    assert (
        first
        == "precision_policy=on: the fp32 weights are computed in fp32 on Some GPU: about 7 times slower than in bf16, on an H200"
    )
    assert fix == "  fix: precision_policy.compute_dtype=bfloat16  (the option mixed does the same)"
    for spelling in (
        "TrainingArguments(bf16=True)",
        '"bf16-mixed"',
        'mixed_precision="bf16"',
        "MixedPrecisionPolicy",
        "torch.autocast",
    ):
        assert spelling in text


@pytest.mark.parametrize(
    "change", [{"set_over_checkpoint": False}, {"asked": "model.torch_dtype=float32", "set_over_checkpoint": False}]
)
def test_the_cost_is_not_said_where_the_policy_did_not_make_it(watch, said, monkeypatch, change):
    """Mocked as above: a model whose own default is fp32, or an fp32 that the user chose."""
    import dataclasses

    monkeypatch.setattr("precision_policy.job.compute_dtype.bf16_device", lambda device: "Some GPU")
    watch(dataclasses.replace(ON, **change))
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert said("WARNING") == []


def own_autocast(model, optimizer, steps=3):
    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    return train(model, optimizer, steps, call)


def checkpointed(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    return Checkpointed()


@pytest.mark.parametrize(
    "make",
    [network, lambda: checkpointed(True), lambda: checkpointed(False)],
    ids=["eager", "checkpointing, reentrant", "checkpointing"],
)
def test_the_same_losses_as_the_applications_own_autocast(watch, said, make):
    """Bit-identical, and nothing is left when the job ends."""
    reference = make()
    expected = own_autocast(reference, torch.optim.AdamW(reference.parameters(), lr=1e-3))
    one = watch()
    model = make()
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert losses == expected
    assert said()[0].endswith("stored in fp32, computed in bf16 by autocast that the policy supplies")
    assert model(batch()).dtype is torch.float32
    one.disarm()
    assert "_compiled_call_impl" not in model.__dict__
    with torch.no_grad():
        assert not torch.equal(model(batch()), reference(batch()).bfloat16().float())


@pytest.mark.parametrize("way", ["torch.compile(model)", "model.compile()", "model.compile() after the first step"])
def test_compiled(watch, said, way):
    """Backend eager: what is tested is where autocast is, not the code that is generated."""
    watch()
    model = network()
    called = torch.compile(model, backend="eager") if way == "torch.compile(model)" else model
    if way == "model.compile()":
        model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = train(model, optimizer, 1, called)
    if way.endswith("first step"):
        model.compile(backend="eager")
    losses += train(model, optimizer, 2, called)
    reference = network()
    compared = own_autocast(reference, torch.optim.AdamW(reference.parameters(), lr=1e-3), 1)
    assert losses[0] == compared[0]
    assert said()[0].endswith("computed in bf16 by autocast that the policy supplies")
    assert called(batch()).dtype is torch.float32
    assert torch.equal(model(batch()), called(batch()))  # also without torch.compile's wrapper, as generate calls it


def test_compiled_while_supplied_stays_compiled(watch):
    """What is compiled runs under autocast, and is still there when the job ends."""
    one, graphs = watch(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.0), 1)
    model.compile(backend=backend, dynamic=False)
    output = model(batch())
    assert len(graphs) == 1
    assert output.dtype is torch.float32
    assert torch.equal(output, output.bfloat16().float())
    one.disarm()
    compiled = model.__dict__["_compiled_call_impl"]
    assert compiled is not None
    assert torch.allclose(model(batch()), network()(batch()), atol=1e-6)
    assert model.__dict__["_compiled_call_impl"] is compiled
    assert len(graphs) == 2  # compiled anew, without autocast


def test_compiled_before_it_was_supplied_stays_compiled(watch):
    one, model = watch(), network()
    model.compile(backend="eager")
    compiled = model.__dict__["_compiled_call_impl"]
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 1)
    assert model.__dict__["_compiled_call_impl"] is not compiled
    one.disarm()
    assert model.__dict__["_compiled_call_impl"] is compiled


def test_several_models_with_an_optimizer_each(watch, said):
    watch()
    models = [network(seed) for seed in (0, 1)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    for seed, model in enumerate(models):
        assert "_compiled_call_impl" in model.__dict__
        reference = network(seed)
        assert not torch.equal(model(batch()), reference(batch()))
    assert len(said()) == 1


def test_each_model_has_the_words_for_its_own_supplier(watch, said):
    """Both models are called before either steps: one under the application's autocast, one under the policy's."""
    watch()
    own, supplied = network(0), network(1)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (own, supplied)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = own(batch()).float().square().mean()
    (loss + supplied(batch()).square().mean()).backward()
    for optimizer in optimizers:
        optimizer.step()
    by = [line.partition("computed in bf16 by ")[2] for line in said()]
    assert by == ["the application's autocast", "autocast that the policy supplies"]
    output = own(batch())  # an evaluation that forgets its autocast
    assert torch.equal(output, output.bfloat16().float())


def test_one_optimizer_over_models_of_several_suppliers(watch, said):
    watch()
    own, supplied = network(0), network(1)
    optimizer = torch.optim.AdamW([*own.parameters(), *supplied.parameters()], lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = own(batch()).float().square().mean()
    (loss + supplied(batch()).square().mean()).backward()
    optimizer.step()
    assert said()[0].endswith("computed in bf16 by the application's autocast and autocast that the policy supplies")


def test_bf16_whatever_autocast_has_by_default(watch):
    """On a GPU that is fp16."""
    watch()
    model = network()
    torch.optim.AdamW(model.parameters(), lr=1e-3)
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    seen, default = [], torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        model(batch())
    finally:
        torch.set_autocast_dtype("cpu", default)
    assert seen == [torch.bfloat16]


def test_a_model_that_turns_autocast_off_inside(watch, said):
    class Exact(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    watch()
    model = Exact(64, 64)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert said()[0].endswith("stored in fp32, computed in fp32")
    (text,) = said("WARNING")
    assert "the model is called under autocast that the policy supplies, but turns it off inside" in text


def test_the_outermost_module_that_owns_is_the_one(watch):
    watch()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            assert torch.is_autocast_enabled("cpu")
            return {"logits": self.inner(x), "hidden": [torch.ones(2, dtype=torch.bfloat16), 3]}

    outer, stranger = Outer(), network()
    torch.optim.AdamW(outer.parameters(), lr=1e-3)
    assert stranger(batch()).dtype is torch.float32
    output = outer(batch())
    assert output["logits"].dtype is output["hidden"][0].dtype is torch.float32
    assert output["hidden"][1] == 3
    assert "_compiled_call_impl" in outer.__dict__
    assert "_compiled_call_impl" not in outer.inner.__dict__
    assert "_compiled_call_impl" not in stranger.__dict__


def test_no_grad_and_exceptions(watch):
    """An exception in ``forward``, a KeyboardInterrupt too, leaves nothing entered."""
    watch()

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.error = nn.Linear(4, 4), None

        def forward(self, x):
            assert torch.is_autocast_enabled("cpu")
            if self.error:
                raise self.error
            return self.inner(x)

    model = Fails()
    torch.optim.AdamW(model.parameters(), lr=1e-3)
    for error in (ValueError, KeyboardInterrupt, None):
        model.error = error
        if error:
            with pytest.raises(error):
                model(torch.ones(2, 4))
        assert not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        assert model(torch.ones(2, 4)).dtype is torch.float32


def test_copies_and_saved_models(watch):
    """They have no trace of the policy and compute with their own weights."""
    watch()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"precision_policy" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        model[0].weight.zero_()
    for one in (copied, loaded):
        assert one.__dict__.get("_compiled_call_impl") is None
        assert one(batch()).abs().sum() > 0
        assert not torch.equal(one(batch()), model(batch()))


def test_a_compiled_model_can_be_copied(watch):
    watch()
    model = torch.compile(network(), backend="eager")
    torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(batch())
    assert copy.deepcopy(model)(batch()).dtype is torch.float32


def test_threads(watch):
    watch()
    model = network()
    torch.optim.AdamW(model.parameters(), lr=1e-3)
    outputs = []
    threads = [threading.Thread(target=lambda: outputs.append(model(batch()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    assert all(torch.equal(outputs[0], one) for one in outputs)
    assert not torch.is_autocast_enabled("cpu")


def test_no_thread_gets_past_the_first_look():
    """While the owner of the weights is dealt with, another thread's call of it waits: it would not be under autocast."""
    model, order, others = network(), [], []

    def call():
        model(batch())
        order.append("called")

    def found(module, params):
        others.append(threading.Thread(target=call))
        others[0].start()
        others[0].join(0.2)
        order.append("found")

    owners = compute_dtype.Owners(found, lambda look, *args: look(*args))
    owners.follow(model.parameters())
    call()
    others[0].join()
    assert order[0] == "found"
    assert len(order) == 3


def test_the_memory_of_a_model_is_freed_at_once(watch):
    import gc
    import weakref

    watch()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_asked_for_and_not_supplied(watch, said):
    """A model that is not called as a module: one WARNING that says so."""
    watch()
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), call=model.forward)
    # The layers inside are called and own some of it, so each of them is under autocast.
    assert said()[0].endswith("computed in bf16 by autocast that the policy supplies")
    weights = nn.Parameter(torch.randn(64, 64))
    optimizer = torch.optim.AdamW([weights], lr=1e-3)
    train(None, optimizer, call=lambda x: x @ weights)
    assert "compute_dtype=bfloat16 was asked for, but the weights are computed in fp32" in said("WARNING")[0]


def test_weights_of_no_called_module_are_not_waited_for(watch, said):
    """They were trained: no call of a module that owns them will come. One that was not trained yet is waited for."""
    plain = nn.Module.__call__
    watch()
    model, later, weights = network(0), network(1), nn.Parameter(torch.randn(64, 64))
    optimizer = torch.optim.AdamW([*model.parameters(), weights], lr=1e-3)
    train(None, optimizer, steps=1, call=lambda x: model(x) @ weights)
    assert nn.Module.__call__ is plain
    both = torch.optim.AdamW([weights, *later.parameters()], lr=1e-3)
    train(None, both, steps=1, call=lambda x: x @ weights)
    assert nn.Module.__call__ is not plain
    train(later, both, steps=1)
    assert nn.Module.__call__ is plain
    assert "_compiled_call_impl" in later.__dict__


def test_adapters_beside_another_model_under_sharding_or_by_hand(watch, said):
    """Where the gradients do not tell, the line says what an adapted model is called under."""
    watch(replace(MIXED, leaves_some_alone=True))
    model = network().requires_grad_(False)
    model[0].requires_grad_(True)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-3)
    model(batch())
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert said()[0].endswith(f"stored in fp32, called under {compute_dtype.LEFT_ALONE}")
    assert not said("WARNING")


def test_a_model_that_was_recast_since_is_not_supplied(watch):
    watch()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.bfloat16()
    model(batch().bfloat16())
    assert optimizer.param_groups[0]["params"][0].dtype is torch.bfloat16
    assert "_compiled_call_impl" not in model.__dict__


def of_number(number, make):
    """An object with the number that another one left."""
    made = []
    while not made or id(made[-1]) != number:
        made.append(make())
        assert len(made) < 10_000
    return made[-1]


def test_numbers_of_what_is_gone(watch, said):
    """An optimizer that is gone before its first step leaves its parameters' numbers to a model that nobody trains."""
    plain = nn.Module.__call__
    watch()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.randn(64, 64))], lr=1e-3)
    number = id(optimizer.param_groups[0]["params"][0])
    assert nn.Module.__call__ is not plain
    del optimizer
    gc.collect()
    teacher = network().requires_grad_(False)
    teacher[0].weight = of_number(number, lambda: nn.Parameter(torch.randn(64, 64), requires_grad=False))
    teacher(batch())
    assert "_compiled_call_impl" not in teacher.__dict__


def test_who_supplied_what_is_gone(watch, said):
    watch()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch())
    number = id(model[0].weight)
    del model, optimizer
    gc.collect()
    weights = of_number(number, lambda: nn.Parameter(torch.randn(64, 64)))
    train(None, torch.optim.AdamW([weights], lr=1e-3), steps=1, call=lambda x: x @ weights)
    assert said()[0].endswith("1 trainable tensor, 4,096 elements: stored in fp32, computed in fp32")
    assert "no module that owns them was called" in said("WARNING")[0]


def test_what_adapters_cost_is_not_said_of_the_model_beside_them(watch, said, monkeypatch):
    """Mocked: a device with matrix units for bf16, which no machine of CI has."""
    monkeypatch.setattr("precision_policy.job.compute_dtype.bf16_device", lambda device: "Some GPU")
    watch(replace(ON, leaves_some_alone=True))
    adapted = network().requires_grad_(False)
    adapted[0].requires_grad_(True)
    train(adapted, torch.optim.AdamW(adapted[0].parameters(), lr=1e-3))
    assert said()[0].endswith("stored in fp32, computed in fp32")
    assert not said("WARNING")
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert "computed in fp32 on Some GPU" in said("WARNING")[0]


@dataclass
class Output:
    loss: torch.Tensor
    name: str = "x"


def test_outputs_of_any_shape():
    from collections import namedtuple

    from transformers.modeling_outputs import CausalLMOutputWithPast

    low = torch.ones(2, dtype=torch.bfloat16)
    Pair = namedtuple("Pair", "a b")
    output = in_fp32(CausalLMOutputWithPast(loss=low, logits=low, hidden_states=(low, low)))
    assert type(output) is CausalLMOutputWithPast
    assert {output.loss.dtype, output.logits.dtype, output.hidden_states[1].dtype} == {torch.float32}
    assert in_fp32(Pair(low, 1)).a.dtype is torch.float32
    assert in_fp32(Output(low)).loss.dtype is torch.float32
    same = {"x": torch.ones(2), "y": [1, "z"], "h": torch.ones(2, dtype=torch.float16)}
    assert in_fp32(same) is same


@pytest.mark.parametrize("body", [LOOP, TRAINER, ACCELERATE], ids=["loop", "trainer", "accelerate"])
def test_frameworks(app, checkpoint, body):
    """``mixed`` in an application that computes in fp32: bf16, supplied; one line."""
    run = app(LOAD.format(checkpoint=checkpoint), HEAD + body)("+precision_policy=mixed")
    assert run.log.splitlines()[1:] == [
        "INFO precision_policy=mixed: 21 trainable tensors, 492,160 elements: "
        "stored in fp32, computed in bf16 by autocast that the policy supplies"
    ]


@pytest.mark.parametrize(
    ("body", "by"),
    [
        (TRAINER.replace("use_cpu=True", "use_cpu=True, bf16=True"), "accelerate's mixed precision"),
        (ACCELERATE.replace("cpu=True", 'cpu=True, mixed_precision="bf16"'), "accelerate's mixed precision"),
        (
            LOOP.replace(
                "        model(input_ids=batch, labels=batch).loss.backward()",
                '        with torch.autocast("cpu", torch.bfloat16):\n            loss = model(input_ids=batch, labels=batch).loss\n        loss.backward()',
            ),
            "the application's autocast",
        ),
    ],
    ids=["trainer", "accelerate", "loop"],
)
def test_where_it_is_there_already(app, checkpoint, body, by):
    """Nothing is added, and the line says who does it."""
    run = app(LOAD.format(checkpoint=checkpoint), HEAD + body)("+precision_policy=mixed")
    assert run.log.splitlines()[1].endswith(f"stored in fp32, computed in bf16 by {by}")


AUTOMATIC = """
    def training_step(self, batch, index):
        return self.net(input_ids=batch, labels=batch).loss
"""
BY_HAND = """
    automatic_optimization = False
    def training_step(self, batch, index):
        optimizer = self.optimizers()
        loss = self.net(input_ids=batch, labels=batch).loss
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
"""
assert AUTOMATIC in LIGHTNING
MANUAL = LIGHTNING.replace(AUTOMATIC, BY_HAND)


@pytest.mark.parametrize("code", [LIGHTNING, MANUAL], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    ("precision", "by"), [("32-true", "autocast that the policy supplies"), ("bf16-mixed", "the application's autocast")]
)
def test_lightning(app, checkpoint, code, precision, by):
    train = app(LIGHTNING_CONFIG.format(checkpoint=checkpoint), code)
    paths = ["precision_policy.model=model.net", "precision_policy.optimizer=model.optimizer"]
    run = train("+precision_policy=mixed", *paths, f"trainer.precision={precision}")
    assert run.log.splitlines()[1].endswith(f"stored in fp32, computed in bf16 by {by}")


@pytest.mark.parametrize("extra", [["model.torch_dtype=bfloat16"], ["+lora={r: 8}"], ["+model.load_in_4bit=true"]])
def test_nothing_is_supplied_to_16_bits_or_peft(app, extra):
    code = """
    import hydra, torch
    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def main(cfg):
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        print("OUTPUT", model(torch.randn(2, 64)).grad_fn)
        assert "_compiled_call_impl" not in model.__dict__
    main()
    """
    import textwrap

    run = app(CONFIG, textwrap.dedent(code))("+precision_policy=mixed", *extra)
    assert "computed in" not in run.log


def test_where_a_dtype_was_chosen_the_fix_gets_bf16_compute_too(app, checkpoint):
    """So it doubles no activations, which ``on`` has to say."""
    train = app(LOAD.format(checkpoint=checkpoint), HEAD + LOOP)
    assert "\n  fix: +model.dtype=float32  (activations double" in train("+precision_policy=on", "+model.dtype=bfloat16").out
    assert "\n  fix: +model.dtype=float32\n" in train("+precision_policy=mixed", "+model.dtype=bfloat16").out
    assert (
        "computed in bf16 by autocast that the policy supplies" in train("+precision_policy=mixed", "+model.dtype=float32").log
    )


FULL_AND_ADAPTERS = """
import hydra, torch
from torch import nn

class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.adapter = nn.Linear(64, 64).bfloat16().requires_grad_(False), nn.Linear(64, 64)

    def forward(self, x):
        return self.base(x.bfloat16()).float() + self.adapter(x)

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    for model in (nn.Sequential(nn.Linear(64, 64)), Adapted()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        print(type(model).__name__, "_compiled_call_impl" in model.__dict__)

main()
"""


def test_of_two_models_the_one_with_adapters_is_left_alone(app):
    config = "a: {dtype: auto}\nb: {dtype: auto}\nlora: {r: 8}\noptimizer: {_target_: torch.optim.AdamW, _partial_: true}\n"
    pairs = "precision_policy.pairs={a:{model:a,peft:null},b:{model:b,peft:lora}}"
    run = app(config, FULL_AND_ADAPTERS)("+precision_policy=mixed", pairs)
    assert "Sequential True\n" in run.out
    assert "Adapted False\n" in run.out
    assert "stored in fp32, computed in bf16 by autocast that the policy supplies" in run.log
    assert run.log.splitlines()[-1].endswith("stored in fp32, computed in fp32")
    assert "WARNING" not in run.log


def test_generate_and_accumulation(app, checkpoint):
    """Two backward passes a step, and sampling from the model in between."""
    body = """
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    for number, batch in enumerate(data()):
        model(input_ids=batch, labels=batch).loss.backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    print("SAMPLE", model.generate(batch[:1], max_new_tokens=3, do_sample=False).shape)

main()
"""
    run = app(LOAD.format(checkpoint=checkpoint), HEAD + body)("+precision_policy=mixed")
    assert "computed in bf16 by autocast that the policy supplies" in run.log
    assert "SAMPLE torch.Size([1, 19])" in run.out


def test_swept(app, checkpoint):
    """Each job of a sweep by itself."""
    train = app(LOAD.format(checkpoint=checkpoint), HEAD + LOOP)
    run = train("--multirun", "+precision_policy=on,mixed,off")
    computed = [line.rpartition("computed in ")[2] for line in run.log.splitlines() if "computed in" in line]
    assert computed == ["fp32", "bf16 by autocast that the policy supplies"]


SPAWN = """
import hydra, torch
import torch.multiprocessing as mp

def work(rank):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    model.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    print("INSIDE", seen[0], flush=True)

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    mp.spawn(work, nprocs=1)

if __name__ == "__main__":
    main()
"""


def test_in_a_process_that_the_job_starts(app):
    assert "INSIDE torch.bfloat16" in app(CONFIG, SPAWN)("+precision_policy=mixed").out


@pytest.mark.parametrize("kernels", ["flash_attention_2", "flash_attention_3"])
def test_kernels_of_16_bits_are_told_before_the_run(compose, kernels):
    config = f"model: {{torch_dtype: auto, attn_implementation: {kernels}}}\noptimizer: {{_target_: torch.optim.AdamW}}"
    told = compose(config, "+precision_policy=on").precision_policy.decision.reason
    assert told.endswith(
        f"model.attn_implementation={kernels} takes 16 bits alone: the job must autocast, or use precision_policy=mixed"
    )
    assert kernels not in compose(config, "+precision_policy=mixed").precision_policy.decision.reason


@pytest.mark.parametrize("value", ["float16", "fp16", "torch.float16", "half"])
def test_fp16_is_refused(app, value):
    run = app()("+precision_policy=on", f"precision_policy.compute_dtype={value}", status=1)
    assert "needs loss scaling, which only the application can do" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("value", ["bfloat16", "bf16", "torch.bfloat16"])
def test_spellings(compose, value):
    cfg = compose(CONFIG, "+precision_policy=on", f"precision_policy.compute_dtype={value}")
    assert cfg.precision_policy.compute_dtype == "bfloat16"


def test_the_way_to_keep_bf16_is_a_line_that_was_tried(app):
    """torch-optimi is installed and takes every argument that stands there, but for the choice among torch's own kernels."""
    train = app(CONFIG.replace("lr: 1.0e-5", "lr: 1.0e-5\n  fused: true\n  weight_decay: 0.1"))
    run = train("+precision_policy=on", "model.torch_dtype=bfloat16")
    line = "optimizer._target_=optimi.AdamW ~optimizer.fused"
    assert f"  or keep bf16 with a compensating optimizer: {line}  (adds 128 B)" in run.out
    after = train("+precision_policy=on", "model.torch_dtype=bfloat16", *line.split())
    assert "WARNING" not in after.log
    amsgrad = train("+precision_policy=on", "model.torch_dtype=bfloat16", "+optimizer.amsgrad=true")
    assert "or keep bf16 with a compensating optimizer: torch-optimi, with Kahan summation" in amsgrad.out


def test_each_job_of_a_sweep_tries_the_line_on_its_own_config(app):
    """The first job's optimizer has an argument that torch-optimi does not take; the second job's has none."""
    train = app(CONFIG.partition("optimizer:")[0] + "defaults: [_self_, optimizer: sgd]\n")
    train.write("conf/optimizer/sgd.yaml", "{_target_: torch.optim.SGD, _partial_: true, lr: 0.1, dampening: 0.0}")
    train.write("conf/optimizer/adamw.yaml", "{_target_: torch.optim.AdamW, _partial_: true, lr: 1e-5}")
    run = train("--multirun", "+precision_policy=on", "model.torch_dtype=bfloat16", "optimizer=sgd,adamw")
    assert "or keep bf16 with a compensating optimizer: optimizer._target_=optimi.AdamW  (adds 128 B)" in run.out


@pytest.mark.parametrize(("capability", "name"), [((7, 5), None), ((8, 0), "GPU 1"), ((9, 0), "GPU 1")])
def test_gpus_with_bf16_units(monkeypatch, capability, name):
    """A mock: there may be no GPU here."""
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: capability if asked == device else (0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda asked: f"GPU {asked.index}")
    assert compute_dtype.bf16_device(device) == name


@pytest.mark.parametrize(("device", "supported", "name"), [("xpu", True, "xpu"), ("xpu", False, None), ("cpu", True, None)])
def test_other_devices_with_bf16_units(monkeypatch, device, supported, name):
    """A mock: other accelerators are asked through their module of torch."""
    monkeypatch.setattr(getattr(torch, device), "is_bf16_supported", lambda: supported, raising=False)
    assert compute_dtype.bf16_device(torch.device(device)) == name
    assert compute_dtype.bf16_device(torch.device("meta")) is None


def overridden(node):
    """Composes the node at job.optimizer as the command line would."""

    def compose(words):
        cfg = {"job": {"optimizer": dict(node)}}
        for word in words:
            key, _, value = word.removeprefix("~").partition("=")
            key = key.removeprefix("job.optimizer.")
            if word.startswith("~"):
                del cfg["job"]["optimizer"][key]
            else:
                cfg["job"]["optimizer"][key] = value
        return OmegaConf.create(cfg)

    return compose


ADAM = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-3}


@pytest.mark.parametrize(
    ("kind", "node", "line"),
    [
        (torch.optim.Adam, ADAM, "job.optimizer._target_=optimi.Adam"),
        (torch.optim.Adam, {**ADAM, "params": None}, "job.optimizer._target_=optimi.Adam"),
        (torch.optim.AdamW, {**ADAM, "_target_": "torch.optim.AdamW"}, "job.optimizer._target_=optimi.AdamW"),
        (
            torch.optim.Adam,
            {**ADAM, "fused": True, "maximize": False, "capturable": False, "differentiable": False},
            "job.optimizer._target_=optimi.Adam ~job.optimizer.fused ~job.optimizer.maximize ~job.optimizer.capturable "
            "~job.optimizer.differentiable",
        ),
        (torch.optim.Adam, {**ADAM, "maximize": True}, None),
        (torch.optim.Adam, {**ADAM, "amsgrad": True}, None),
        (torch.optim.Adam, {"name": "adam"}, None),
        (torch.optim.Adam, {**ADAM, "_target_": "lion.Lion"}, None),
        (torch.optim.SGD, {**ADAM, "_target_": "torch.optim.SGD"}, None),
    ],
)
def test_the_line_for_a_compensating_optimizer(kind, node, line):
    """It is tried: torch-optimi makes its optimizer from what the line leaves."""
    pytest.importorskip("optimi")
    optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
    assert compensating.line(optimizer, "job.optimizer", overridden(node)) == line


def test_a_line_that_the_optimizer_refuses():
    pytest.importorskip("optimi")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
    with pytest.raises(ValueError, match="lr"):
        compensating.line(optimizer, "job.optimizer", overridden({**ADAM, "lr": -1.0}))


def test_where_torch_optimi_is_not_installed(monkeypatch):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=1e-3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert compensating.line(optimizer, "job.optimizer", overridden(ADAM)) is None
    assert compensating.line(optimizer, "elsewhere", overridden(ADAM)) is None


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(64, 64, 64, 32)], "bf16"),
        ([(63, 63, 63, 40)], None),
        ([(80, 80, 80, 31)], None),
        ([(100, 99, 100, 50)], "fp16"),
        ([(100, 0, 99, 50)], None),
        ([(100, 0, 1, 50)], None),
        ([(1000, 0, 9, 50)], "fp32"),
        ([(1000, 0, 9, 50), (1000, 1000, 1000, 50)], "bf16"),
        ([(1000, 0, 9, 50)] * 2 + [(1000, 1000, 1000, 50)], "bf16 in part"),
        ([(1000, 0, 10, 50)] * 2 + [(1000, 1000, 1000, 50)], "bf16"),
        ([], None),
    ],
)
def test_what_the_low_bits_tell(rows, told):
    """64 elements, 32 values, and shares over 99% or under 1%."""
    assert computed_in(LowBits(*row) for row in rows) == told


def test_low_bits_are_counted_exactly():
    smallest = torch.tensor(1, dtype=torch.int32).view(torch.float32).item()
    gradient = torch.tensor([0.0, 1.0, -1.0, 1.0 + 2.0**-8, 1.0 + 2.0**-10, 1.0 + 2.0**-23, smallest, -0.0, 1.5])
    assert LowBits(*low_bits(gradient).tolist()) == LowBits(7, 3, 5, 7)


@pytest.mark.parametrize(("precision", "told"), [("highest", "fp32"), ("high", "TF32"), ("medium", "TF32"), (None, "fp32")])
def test_tf32_is_told_by_its_switch(monkeypatch, precision, told):
    def switch():
        if precision is None:
            raise RuntimeError("both the old and the new switches were used")
        return precision

    monkeypatch.setattr(torch, "get_float32_matmul_precision", switch)
    assert compute_dtype.fp32_or_tf32("fp32", torch.device("cuda")) == told
    assert compute_dtype.fp32_or_tf32("fp32", torch.device("cpu")) == "fp32"
    assert compute_dtype.fp32_or_tf32("bf16", torch.device("cuda")) == "bf16"


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_a_wrapper_wraps_is_supplied_too(watch, said):
    """Evaluation calls it without the wrapper: transformers' Trainer does, and whoever generates from ``model.module``."""
    one, model = watch(), network()
    wrapped = nn.DataParallel(model)
    losses = train(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-3))
    reference = network()
    assert losses == own_autocast(reference, torch.optim.AdamW(reference.parameters(), lr=1e-3))
    assert said()[0].endswith("computed in bf16 by autocast that the policy supplies")
    with torch.no_grad():
        output = model(batch())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(output, reference(batch()).float())
        assert output.dtype is torch.float32
        one.disarm()
        assert not torch.equal(output, model(batch()))
    assert "_compiled_call_impl" not in model.__dict__


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, None), (None, None)]
)
def test_what_fsdp_says(one_rank, dtype, name):
    """FSDP1 and FSDP2 as they are, on one rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

    told = ("FSDP's mixed precision", name) if name else None
    for orig in (False, True):
        policy = MixedPrecision(param_dtype=dtype)
        wrapped = FullyShardedDataParallel(
            network(), mixed_precision=policy, use_orig_params=orig, device_id=torch.device("cpu")
        )
        assert compute_dtype.supplier(wrapped, "cpu") == told
        assert compute_dtype.supplier(nn.Sequential(wrapped), "cpu") == told
    sharded = network()
    fully_shard(sharded, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    assert compute_dtype.supplier(sharded, "cpu") == told
    assert compute_dtype.is_sharded(list(sharded.parameters())[:1])
    assert compute_dtype.supplier(FullyShardedDataParallel(network(), device_id=torch.device("cpu")), "cpu") is None


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("plan", [ON, MIXED])
def test_where_sharded_gradients_do_not_tell(one_rank, watch, said, monkeypatch, plan, own):
    """What the model is called under is said, and a warning where that is nothing. Mocked: a device with bf16 units."""
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr("precision_policy.job.compute_dtype.bf16_device", lambda device: "Some GPU")
    watch(plan)
    model = network()
    fully_shard(model)
    for _ in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        (own_autocast if own else train)(model, optimizer)
    under = {ON: "no autocast or mixed precision", MIXED: "autocast that the policy supplies"}[plan]
    under = "the application's autocast" if own else under
    (line,) = said()
    assert line.endswith(f"stored in fp32, called under {under}")
    warned = (
        "precision_policy=on: the fp32 weights are called under no autocast or mixed precision on Some GPU: "
        "about 7 times slower than in bf16, on an H200, unless the model turns autocast on inside"
    )
    firsts = [text.splitlines()[0] for text in said("WARNING")]
    assert firsts == ([warned] if plan is ON and not own else [])


@pytest.mark.parametrize("plan", [ON, MIXED])
def test_fsdp_names_its_compute_dtype(one_rank, watch, said, plan):
    """Then that is said, and nothing is added."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    watch(plan)
    model = network()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert said()[0].endswith("stored in fp32, computed in bf16 by FSDP's mixed precision")
    assert "_compiled_call_impl" not in model.__dict__


def test_who_supplies_already():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    model = network()
    assert compute_dtype.supplier(model, "cpu") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype.supplier(model, "cpu") == ("the application's autocast", None)
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        assert compute_dtype.supplier(prepared, "cpu") == ("accelerate's mixed precision", None)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def test_keywords_reach_the_model(watch):
    class Scaled(Network):
        def forward(self, x, *, factor):
            return {0: super().forward(x) * factor, "factor": factor}

    watch()
    torch.manual_seed(0)
    model = Scaled(nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for own in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=own):
            output = model(batch(), factor=2)
        assert output["factor"] == 2
        assert output[0].dtype is (torch.bfloat16 if own else torch.float32)
        output[0].float().sum().backward()
        optimizer.step()


def test_each_optimizer_is_followed_to_its_first_step_and_no_further(watch, said):
    """Nothing is kept of an optimizer that has stepped."""
    one = watch()
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 2)
    assert (one._before_first_step, one._warned, one._probes, one._suppliers) == (set(), set(), {}, {})
