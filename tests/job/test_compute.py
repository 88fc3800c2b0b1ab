"""What is known of an optimizer's compute, what is supplied, and what is said of it: nothing that was not seen."""

import gc
import logging
from dataclasses import replace

import pytest
import torch
from networks import (
    MIXED,
    ON,
    SET,
    Network,
    adamw,
    autocast_bf16,
    batch,
    is_in_fp32,
    network,
    of_number,
    record,
    train,
    under_own_autocast,
    watching,
)
from torch import nn

from precision_policy.job import compute
from precision_policy.job.compute import Computed
from precision_policy.job.events import Listener
from precision_policy.job.words import APPLICATIONS, LEFT_ALONE, NOBODY, POLICYS

pytestmark = pytest.mark.once
SLOT = "_compiled_call_impl"
PEFT = replace(SET, rule="peft", fp32=False)


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.INFO, "precision_policy")
    return lambda: [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]


@pytest.fixture(autouse=True)
def torch_as_it_was():
    before = nn.Module.__call__, nn.Module.compile
    yield
    assert (nn.Module.__call__, nn.Module.compile) == before
    assert "__call__" not in Network.__dict__


@pytest.fixture
def gpu(monkeypatch):
    """Mocked: a device with matrix units for bf16, which no machine of CI has. The rest of the path is real."""
    monkeypatch.setattr(compute, "bf16_device", lambda device: "Some GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", [ON, MIXED], ids=["on", "mixed"])
def test_the_applications_autocast(warned, gpu, one, dtype):
    """Known by the call, confirmed by the gradients."""
    with watching(one) as seen:
        model = network()
        optimizer = adamw(model)

        def call(x):
            with torch.autocast("cpu", dtype=dtype):
                return model(x)

        train(model, optimizer, call=call)
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert seen.answer(optimizer) == Computed(name, APPLICATIONS)
    assert warned() == []
    assert not any(p._backward_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_supplied():
    with watching() as seen:
        model = network()
        optimizer = adamw(model)
        train(model, optimizer)
        assert seen.answer(optimizer) == Computed("bf16", POLICYS)
        assert seen.modules(optimizer) == [model]
        assert not is_in_fp32(model(batch()))
    assert SLOT not in model.__dict__


def test_without_mixed_nothing_is_supplied_and_nothing_stays_on_the_model():
    with watching(ON) as seen:
        model = network()
        optimizer = adamw(model)
        assert is_in_fp32(model(batch()))
        assert SLOT in model.__dict__
        train(model, optimizer, 1)
        assert SLOT not in model.__dict__
        assert seen.answer(optimizer) == Computed(None, NOBODY)
        assert seen.modules(optimizer) == [model]


def test_the_answer_is_there_for_whoever_hears_of_the_first_step_before(warned):
    """In ``stepped``, whatever the order of the listeners."""
    answers = []

    class Asks(Listener):
        def stepped(self, optimizer):
            answers.append((seen.answer(optimizer), seen.modules(optimizer)))

    with watching(others=[Asks()]) as seen:
        model = network()
        train(model, adamw(model), 2)
    assert answers == [(Computed("bf16", POLICYS), [model])] * 2


def test_a_closure_computes_within_the_step():
    with watching() as seen:
        model = network()
        optimizer = adamw(model)

        def closure():
            loss = model(batch()).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert seen.answer(optimizer) == Computed("bf16", POLICYS)


def by_hand(model, optimizer):
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()


def test_of_gradients_by_hand_nothing_is_known():
    with watching(ON) as seen:
        model = network()
        optimizer = adamw(model)
        by_hand(model, optimizer)
        assert seen.answer(optimizer) == Computed(None, None)
        assert seen.modules(optimizer) == []


class TestNothingUntrue:
    """Gradients confirm a dtype; they never deny what a call was seen under."""

    @pytest.mark.parametrize("one", [ON, MIXED], ids=["on", "mixed"])
    @pytest.mark.parametrize("how", ["penalty", "weight_norm", "spectral_norm"])
    def test_what_adds_to_gradients_in_fp32(self, warned, gpu, how, one):
        model = network()
        if how != "penalty":
            for layer in (model[0], model[3]):
                getattr(nn.utils.parametrizations, how)(layer)
        with watching(one) as seen:
            optimizer = adamw(model)
            with autocast_bf16(enabled=one is ON):
                loss = model(batch()).float().square().mean()
            if how == "penalty":
                loss = loss + 1e-3 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimizer.step()
            assert seen.answer(optimizer) == Computed(None, APPLICATIONS if one is ON else POLICYS)
        assert warned() == []

    def test_a_model_that_turns_autocast_off_inside(self, warned):
        """It is called under autocast; that it was computed in bf16 is not said."""

        class Exact(nn.Linear):
            def forward(self, x):
                with autocast_bf16(enabled=False):
                    return super().forward(x)

        with watching() as seen:
            model = Exact(64, 64)
            optimizer = adamw(model)
            train(model, optimizer)
            assert seen.answer(optimizer) == Computed(None, POLICYS)
        assert warned() == []

    def test_a_model_that_turns_autocast_on_inside(self, warned, gpu):
        """Nobody is seen to supply it, and its gradients show it: no word about slow compute."""

        class Inside(Network):
            def forward(self, x):
                with autocast_bf16():
                    return super().forward(x)

        with watching(ON) as seen:
            model = Inside(nn.Linear(64, 64), nn.Linear(64, 64))
            optimizer = adamw(model)
            train(model, optimizer)
            assert seen.answer(optimizer) == Computed("bf16", None)
        assert warned() == []

    def test_a_later_call_under_autocast_counts(self, warned, gpu):
        """An evaluation before the training, without autocast; the gradients alone would not tell."""
        with watching(ON) as seen:
            model = network()
            optimizer = adamw(model)
            model(batch())
            with autocast_bf16():
                loss = model(batch()).float().square().mean()
            (loss + 1e-3 * sum(p.square().sum() for p in model.parameters())).backward()
            optimizer.step()
            assert seen.answer(optimizer) == Computed(None, APPLICATIONS)
        assert warned() == []

    def test_bf16_weights(self, warned, gpu):
        """``mixed`` supplies nothing to them, and of their compute nothing is known."""
        with watching() as seen:
            model = network().bfloat16()
            optimizer = adamw(model)
            model(batch().bfloat16()).float().square().mean().backward()
            optimizer.step()
            assert seen.answer(optimizer) == Computed(None, None)
            assert seen.modules(optimizer) == [model]
            assert SLOT not in model.__dict__
        assert warned() == []

    def test_a_model_that_was_recast_since_is_not_supplied(self, warned):
        with watching() as seen:
            model = network()
            optimizer = adamw(model)
            model.bfloat16()
            model(batch().bfloat16()).float().square().mean().backward()
            optimizer.step()
            assert SLOT not in model.__dict__
            assert seen.answer(optimizer) == Computed(None, None)
        assert warned() == []


class TestSlow:
    """The WARNING for fp32 weights that the policy asked for, where bf16 would be fast."""

    def train(self, one, models=1):
        with watching(one, "precision_policy=on"):
            for _ in range(models):
                model = network()
                train(model, adamw(model))

    def test_once(self, warned, gpu):
        self.train(ON, models=2)
        (text,) = warned()
        first, fix, setting, *_ = text.splitlines()
        assert first == (
            "precision_policy=on: the fp32 weights are called under no autocast or mixed precision on Some GPU: "
            "about 7 times slower than in bf16, on an H200, unless the model turns autocast on inside"
        )
        assert fix == "  fix, as by the option mixed:"
        assert setting == "    precision_policy.compute_dtype=bfloat16"
        for spelling in (
            "TrainingArguments(bf16=True)",
            '"bf16-mixed"',
            'mixed_precision="bf16"',
            "MixedPrecisionPolicy",
            'torch.autocast("cpu"',
        ):
            assert spelling in text

    def test_tf32_costs_less(self, warned, gpu, monkeypatch):
        """Mocked: torch's switch as a GPU reads it."""
        monkeypatch.setattr(compute, "multiplies_in_tf32", lambda device: True)
        self.train(ON)
        assert "on Some GPU: about 3 times slower" in warned()[0]

    def test_not_on_a_device_without_such_units(self, warned):
        self.train(ON)
        assert warned() == []

    @pytest.mark.parametrize("rule", ["explicit_dtype", "warn_only", "no_dtype_key"])
    def test_not_where_the_policy_did_not_ask_for_fp32(self, warned, gpu, rule):
        self.train(record(decisions=[replace(SET, rule=rule)]))
        assert warned() == []

    def test_not_where_the_model_is_fp32_by_itself(self, warned, gpu):
        self.train(record(decisions=[replace(SET, loads_checkpoint_dtype=False)]))
        assert warned() == []

    def test_not_on_other_ranks(self, warned, gpu, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        self.train(ON)
        assert warned() == []

    def test_not_of_weights_that_no_call_was_seen_of(self, warned, gpu):
        """What they were called under is then not known."""
        weights = nn.Parameter(torch.randn(64, 64))
        with watching(ON):
            train(None, torch.optim.SGD([weights], lr=0.1), call=lambda x: x @ weights)
        assert warned() == []


class TestNotSupplied:
    """The WARNING for bf16 compute that was asked for and is not supplied, with the reason."""

    def test_weights_of_no_module(self, warned):
        weights = nn.Parameter(torch.randn(64, 64))
        with watching() as seen:
            optimizer = torch.optim.SGD([weights], lr=0.1)
            train(None, optimizer, call=lambda x: x @ weights)
            assert seen.answer(optimizer) == Computed(None, None)
        (text,) = warned()
        assert text.splitlines() == [
            "precision_policy=mixed: compute_dtype=bfloat16 was asked for, and is not supplied: until the first step, no module "
            "that owns the weights was called through its __call__, outside of functions that were compiled before",
            '  fix: put torch.autocast("cpu", torch.bfloat16) around what computes with the weights',
        ]

    def test_its_fix_was_tried(self, warned):
        weights = nn.Parameter(torch.randn(64, 64))
        with watching() as seen:
            optimizer = torch.optim.SGD([weights], lr=0.1)
            train(None, optimizer, call=under_own_autocast(lambda x: x @ weights))
            assert seen.answer(optimizer) == Computed("bf16", None)
        assert warned() == []

    def test_a_model_that_is_called_by_its_forward(self, warned):
        """The layers inside are called and own some of it, so each of them is under autocast."""
        with watching() as seen:
            model = network()
            optimizer = adamw(model)
            train(model, optimizer, call=model.forward)
            assert seen.answer(optimizer) == Computed("bf16", POLICYS)
            assert seen.modules(optimizer) == [model[0], model[2], model[3]]
        assert warned() == []

    @pytest.mark.parametrize("own", [False, True])
    def test_data_parallel(self, warned, own):
        """Mocked: the devices, and what is done on them."""

        class TwoDevices(nn.DataParallel):
            def forward(self, x):
                return self.module(x)

        with watching() as seen:
            model = TwoDevices(network())
            model.device_ids = [0, 1]
            optimizer = adamw(model)
            train(model, optimizer, call=under_own_autocast(model) if own else model)
            assert seen.answer(optimizer) == (Computed("bf16", APPLICATIONS) if own else Computed(None, NOBODY))
            assert is_in_fp32(model(batch()))
        if own:
            assert warned() == []
        else:
            (text,) = warned()
            assert text.splitlines()[0].endswith("is not supplied: nn.DataParallel calls copies of the model, in threads "
                                                 "that have an autocast of their own")  # fmt: skip
            assert text.splitlines()[1] == "  fix: one process for each GPU, with torch.nn.parallel.DistributedDataParallel"

    @pytest.mark.newest
    def test_fsdp_that_names_fp32(self, warned, one_rank):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        with watching() as seen:
            model = fully_shard(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
            optimizer = adamw(model)
            train(model, optimizer)
            assert seen.answer(optimizer) == Computed(None, "FSDP's mixed precision, which names fp32")
            assert SLOT not in model.__dict__
        (text,) = warned()
        assert "the model is under FSDP's mixed precision, which names fp32\n  fix: name torch.bfloat16 there" in text

    def test_a_look_that_fails(self, warned, monkeypatch):
        """Said once; the job goes on."""

        def fails(module):
            raise ValueError("of an unknown kind")

        monkeypatch.setattr(compute.autocast, "own_precision", fails)
        with watching():
            model = network()
            train(model, adamw(model))
            train(model, adamw(model))
        assert "precision_policy=mixed: it could not be told what a model is computed in; the job goes on" in warned()


class TestSeveral:
    """Models, optimizers, and who supplies what to which."""

    def test_models_with_an_optimizer_each(self):
        with watching():
            models = [network(seed) for seed in (0, 1)]
            optimizers = [adamw(model) for model in models]
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer)
            assert not any(is_in_fp32(model(batch())) for model in models)

    def test_each_model_has_its_own_supplier(self):
        """Both models are called before either steps: one under the application's autocast, one under the policy's."""
        with watching() as seen:
            own, supplied = network(0), network(1)
            optimizers = adamw(own), adamw(supplied)
            loss = under_own_autocast(own)(batch()).float().square().mean()
            (loss + supplied(batch()).square().mean()).backward()
            for optimizer in optimizers:
                optimizer.step()
            answers = [seen.answer(optimizer) for optimizer in optimizers]
            assert answers == [Computed("bf16", APPLICATIONS), Computed("bf16", POLICYS)]
            assert not is_in_fp32(own(batch()))  # an evaluation that forgets its autocast

    def test_one_optimizer_over_models_of_several_suppliers(self):
        with watching() as seen:
            own, supplied = network(0), network(1)
            optimizer = adamw(own, supplied)
            loss = under_own_autocast(own)(batch()).float().square().mean()
            (loss + supplied(batch()).square().mean()).backward()
            optimizer.step()
            assert seen.answer(optimizer) == Computed("bf16", f"{APPLICATIONS} and {POLICYS}")
            assert seen.modules(optimizer) == [own, supplied]

    @pytest.mark.parametrize("one", [ON, MIXED], ids=["on", "mixed"])
    def test_fresh_optimizers_over_the_same_model(self, one):
        """One layer of autocast, one record, and torch's own call after each; 0.2.0 ended in a RecursionError at 600."""
        plain = nn.Module.__call__
        with watching(one) as seen:
            model = network()
            for _ in range(600):
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
                model(batch())
                assert nn.Module.__call__ is plain
                by_hand(model, optimizer)
            assert len(seen._seen) == 1
            assert seen.answer(optimizer).by == (NOBODY if one is ON else POLICYS)
            if one is MIXED:
                assert model.__dict__[SLOT].inner is None

    def test_an_optimizer_for_each_parameter(self, monkeypatch):
        """At its first step, each is not held against all others: of 10,000 that would take minutes."""
        looks = []
        trainable = compute._trainable
        monkeypatch.setattr(compute, "_trainable", lambda optimizer: looks.append(optimizer) or trainable(optimizer))
        with watching(ON):
            model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(40)])
            optimizers = [torch.optim.SGD([param], lr=1e-3) for param in model.parameters()]
            model(batch()).sum().backward()
            assert SLOT in model.__dict__
            for optimizer in optimizers[:-1]:
                optimizer.step()
            assert SLOT in model.__dict__
            optimizers[-1].step()
            assert SLOT not in model.__dict__
        assert len(looks) <= 5 * len(optimizers)

    def test_two_optimizers_over_parts_of_one_model(self, warned, gpu):
        """The first one's step does not end what is noted for the second."""
        with watching(ON) as seen:
            model = network()
            first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[3]))
            model(batch()).square().mean().backward()
            first.step()
            loss = under_own_autocast(model)(batch()).float().square().mean()
            (loss + 1e-3 * model[3].weight.square().sum()).backward()
            second.step()
            assert seen.answer(first) == Computed(None, NOBODY)
            assert seen.answer(second) == Computed(None, APPLICATIONS)

    @pytest.mark.newest
    def test_models_that_are_gone_are_forgotten(self):
        with watching() as seen:
            for seed in range(3):
                model = network(seed)
                train(model, adamw(model), 1)
                del model
                gc.collect()
            assert len(seen._seen) == 1
            assert len(seen._autocast._calls) == 0

    def test_weights_of_no_called_module_are_not_waited_for(self):
        """They were trained: no call of a module that owns them will come. One that was not trained yet is waited for."""
        plain = nn.Module.__call__
        with watching():
            model, later, weights = network(0), network(1), nn.Parameter(torch.randn(64, 64))
            optimizer = torch.optim.AdamW([*model.parameters(), weights], lr=1e-3)
            train(None, optimizer, steps=1, call=lambda x: model(x) @ weights)
            assert nn.Module.__call__ is plain
            both = torch.optim.AdamW([weights, *later.parameters()], lr=1e-3)
            train(None, both, steps=1, call=lambda x: x @ weights)
            assert nn.Module.__call__ is not plain
            train(later, both, steps=1)
            assert nn.Module.__call__ is plain
            assert not is_in_fp32(later(batch()))

    @pytest.mark.newest
    def test_who_supplied_what_is_gone_is_not_said_of_what_has_its_number(self, warned):
        with watching() as seen:
            model = network()
            optimizer = adamw(model)
            under_own_autocast(model)(batch())
            number = id(model[0].weight)
            del model, optimizer
            gc.collect()
            weights = of_number(number, lambda: nn.Parameter(torch.randn(64, 64)))
            optimizer = torch.optim.AdamW([weights], lr=1e-3)
            train(None, optimizer, steps=1, call=lambda x: x @ weights)
            assert seen.answer(optimizer) == Computed(None, None)
        assert "no module that owns the weights was called" in warned()[0]

    def test_nothing_is_kept_of_an_optimizer_that_is_gone(self):
        with watching() as seen:
            model = network()
            train(model, adamw(model), 2)
            gc.collect()
            assert (len(seen._gradients), len(seen._answers), seen._owners._new) == (0, 0, [])
            assert len(seen._owners._wanted) == 0


class TestLeftAlone:
    """PEFT and quantized models, and what the config wants in 16 bits."""

    @pytest.mark.parametrize(
        "decisions",
        [
            [],
            [PEFT],
            [replace(PEFT, rule="quantized")],
            [replace(SET, rule="explicit_dtype", fp32=False)],
            [PEFT, replace(SET, rule="explicit_dtype", fp32=False)],
        ],
        ids=["nothing decided", "peft", "quantized", "bf16", "peft and bf16"],
    )
    def test_nothing_is_supplied(self, warned, decisions):
        with watching(record("bfloat16", decisions)):
            model = network()
            train(model, adamw(model))
            assert is_in_fp32(model(batch()))
        assert warned() == []

    @pytest.mark.parametrize("rule", ["no_model", "no_optimizer", "no_dtype_key", "not_torch_optim", "warn_only"])
    def test_an_fp32_model_that_the_config_does_not_tell_of_is_supplied(self, rule):
        with watching(record("bfloat16", [replace(SET, rule=rule, fp32=False)])):
            model = network()
            train(model, adamw(model))
            assert not is_in_fp32(model(batch()))

    def adapted(self):
        model = network().requires_grad_(False)
        model[0].requires_grad_(True)
        return model, torch.optim.AdamW(model[0].parameters(), lr=1e-3)

    def test_of_two_models_the_one_with_frozen_parts(self, warned, gpu):
        """The decisions are not told apart by the model that is called; one with frozen parts is the adapted one."""
        with watching(record("bfloat16", [SET, PEFT])) as seen:
            adapted, its = self.adapted()
            train(adapted, its)
            assert seen.answer(its) == Computed(None, LEFT_ALONE)
            assert is_in_fp32(adapted(batch()))
            model = network()
            train(model, adamw(model))
            assert not is_in_fp32(model(batch()))
        assert warned() == []

    def test_what_adapters_cost_is_not_said_of_the_model_beside_them(self, warned, gpu):
        with watching(record(decisions=[SET, PEFT])):
            adapted, its = self.adapted()
            train(adapted, its)
            assert warned() == []
            model = network()
            train(model, adamw(model))
        assert "no autocast or mixed precision on Some GPU" in warned()[0]

    def test_a_model_with_frozen_parts_in_a_job_of_its_own_is_supplied(self):
        with watching() as seen:
            adapted, its = self.adapted()
            train(adapted, its)
            assert seen.answer(its) == Computed("bf16", POLICYS)


@pytest.mark.newest
class TestOwnPrecision:
    """Where models bring a mixed precision along, nothing is added."""

    @pytest.mark.parametrize("one", [ON, MIXED], ids=["on", "mixed"])
    def test_fsdp_names_its_compute_dtype(self, one_rank, warned, gpu, one):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        with watching(one) as seen:
            model = fully_shard(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
            optimizer = adamw(model)
            train(model, optimizer)
            assert seen.answer(optimizer) == Computed("bf16", "FSDP's mixed precision")
            assert SLOT not in model.__dict__
        assert warned() == []

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("one", [ON, MIXED], ids=["on", "mixed"])
    def test_where_sharded_gradients_do_not_tell(self, one_rank, warned, gpu, one, own):
        """What the model is called under is known all the same."""
        from torch.distributed.fsdp import fully_shard

        with watching(one) as seen:
            model = fully_shard(network())
            for _ in range(2):
                optimizer = adamw(model)
                train(model, optimizer, call=under_own_autocast(model) if own else model)
                expected = APPLICATIONS if own else {ON: NOBODY, MIXED: POLICYS}[one]
                assert seen.answer(optimizer) == Computed(None, expected)
        assert len(warned()) == (one is ON and not own)

    def test_a_part_with_a_precision_of_its_own(self, warned):
        """Between Fabric's parts, products stay in fp32, as without the policy."""
        from lightning.fabric import Fabric

        between = []

        class Whole(nn.Module):
            def __init__(self, a, b):
                super().__init__()
                self.a, self.b = a, b

            def forward(self, x):
                hidden = self.a(x)
                between.append((x @ x.T).dtype)
                return self.b(hidden)

        fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
        with watching() as seen:
            whole = Whole(fabric.setup_module(nn.Linear(64, 64)), fabric.setup_module(nn.Linear(64, 64)))
            optimizer = adamw(whole)
            for number in range(2):
                fabric.backward(whole(batch(number)).square().mean())
                optimizer.step()
            assert seen.answer(optimizer) == Computed("bf16", "Fabric's bf16-mixed")
        assert set(between) == {torch.float32}
        assert warned() == []


def test_lazy_modules(warned):
    """They have no weights when the optimizer is made, and none when their owner is called first."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(64), nn.GELU(), nn.Linear(64, 64))

    with watching() as seen:
        model = make()
        optimizer = adamw(model)
        losses = train(model, optimizer)
        assert seen.answer(optimizer) == Computed("bf16", POLICYS)
        assert type(model[0]) is nn.Linear
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    reference = make()
    assert losses == train(reference, adamw(reference), call=under_own_autocast(reference))
    assert warned() == []


def test_a_lazy_module_that_is_the_whole_model(warned):
    with watching() as seen:
        model = nn.LazyLinear(64)
        optimizer = adamw(model)
        train(model, optimizer)
        assert seen.answer(optimizer) == Computed(None, POLICYS)  # no matrix was there whose gradient could be looked at
        assert not is_in_fp32(model(batch()))
    assert warned() == []


@pytest.mark.parametrize("params", ["own", "tensors"])
def test_functional_call_first(warned, params):
    with watching() as seen:
        model = network()
        optimizer = adamw(model)
        given = {name: p if params == "own" else p * 1 for name, p in model.named_parameters()}
        loss = torch.func.functional_call(model, given, (batch(),)).square().mean()
        loss.backward()
        optimizer.step()
        assert seen.answer(optimizer) == Computed("bf16", POLICYS)
        assert not is_in_fp32(model(batch()))
    assert warned() == []


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("one", [ON, MIXED], ids=["on", "mixed"])
@pytest.mark.newest
def test_a_compiled_loss_function(warned, gpu, one, own):
    """Supplied within its graph. Without ``mixed``, the graph is torch's own, and is compiled once."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with watching(one) as seen:
        model = network()
        optimizer = adamw(model)

        def loss(x):
            return call(x).float().square().mean()

        call = under_own_autocast(model) if own else model
        compiled = torch.compile(loss, backend=backend, fullgraph=True)
        for number in range(3):
            compiled(batch(number)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(graphs) == 1
        if own:
            assert seen.answer(optimizer) == Computed("bf16", APPLICATIONS)
        else:
            assert seen.answer(optimizer) == (Computed("bf16", POLICYS) if one is MIXED else Computed(None, NOBODY))
        compiled(batch()[:4])  # of another size: compiled anew
        assert len(graphs) == 2
        assert [code.count("_enter_autocast(") for code in graphs] == [own or one is MIXED] * 2
    assert len(warned()) == (one is ON and not own)


@pytest.mark.newest
def test_a_function_that_was_compiled_before_the_optimizer_was_made(warned):
    """Its graph calls no module any more: supplied is what is compiled anew; and the reason is said."""
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(lambda x: model(x).square().mean(), backend="eager")
    compiled(batch())
    with watching() as seen:
        optimizer = adamw(model)
        train(None, optimizer, call=compiled)
        assert seen.answer(optimizer).dtype is None
    assert len(warned()) == 1


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("capability", "name"), [((7, 5), None), ((8, 0), "GPU 1"), ((9, 0), "GPU 1")])
def test_gpus_with_bf16_units(monkeypatch, capability, name):
    """A mock: there may be no GPU here."""
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: capability if asked == device else (0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda asked: f"GPU {asked.index}")
    assert compute.bf16_device(device) == name


@pytest.mark.parametrize(("device", "supported", "name"), [("xpu", True, "xpu"), ("xpu", False, None), ("cpu", True, None)])
def test_other_devices_with_bf16_units(monkeypatch, device, supported, name):
    """A mock: other accelerators are asked through their module of torch."""
    monkeypatch.setattr(getattr(torch, device), "is_bf16_supported", lambda: supported, raising=False)
    assert compute.bf16_device(torch.device(device)) == name
    assert compute.bf16_device(torch.device("meta")) is None


@pytest.mark.parametrize(("precision", "told"), [("highest", False), ("high", True), ("medium", True), (None, False)])
def test_tf32_is_told_by_its_switch(monkeypatch, precision, told):
    def switch():
        if precision is None:
            raise RuntimeError("both the old and the new switches were used")
        return precision

    monkeypatch.setattr(torch, "get_float32_matmul_precision", switch)
    assert compute.multiplies_in_tf32(torch.device("cuda")) is told
    assert compute.multiplies_in_tf32(torch.device("cpu")) is False
