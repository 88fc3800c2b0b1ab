"""bf16 autocast around a model's forward: as an application would write it, and not a trace of it elsewhere."""

import collections
import copy
import dataclasses
import gc
import io
import threading
import warnings
import weakref

import pytest
import torch
from networks import Network, adamw, autocast_bf16, batch, is_in_fp32, network, train, under_own_autocast
from torch import nn

from precision_policy.job import autocast
from precision_policy.job.autocast import Autocast, in_fp32

pytestmark = pytest.mark.once
SLOT = "_compiled_call_impl"


@pytest.fixture
def supply():
    """Puts autocast around modules, and leaves torch as it was."""
    before = nn.Module.compile, nn.Module._replicate_for_data_parallel, torch.jit._trace._check_trace
    one = Autocast()

    def supply(module, device_type="cpu"):
        one.supply(module, device_type)
        return module

    supply.stop, supply.note = one.stop, one.note
    calls = {kind: kind.__call__ for kind in (nn.Linear, nn.Sequential, Network)}
    yield supply
    one.stop()
    assert all(kind.__call__ is call for kind, call in calls.items())
    assert (nn.Module.compile, nn.Module._replicate_for_data_parallel, torch.jit._trace._check_trace) == before


def checkpointed(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    return Checkpointed()


MODELS = {
    "eager": network,
    "checkpointing, reentrant": lambda: checkpointed(True),
    "checkpointing": lambda: checkpointed(False),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_same_losses_as_the_applications_own_autocast(supply, make):
    """Bit-identical, and nothing is left when the job ends."""
    reference, model = make(), supply(make())
    expected = train(reference, adamw(reference), call=under_own_autocast(reference))
    assert train(model, adamw(model)) == expected
    assert model(batch()).dtype is torch.float32
    supply.stop()
    assert SLOT not in model.__dict__
    with torch.no_grad():
        assert is_in_fp32(model(batch()))


def test_several_steps_in_one_call_see_the_weights_of_each(supply):
    """Lightning under DDP calls a whole training step so. Autocast's cache would keep the casts of the first weights."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 1)

        def forward(self, optimizer):
            return train(self.net, optimizer)

    torch.manual_seed(0)
    model = supply(Steps())
    losses = model(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(0)
    exact = Steps()
    assert losses == pytest.approx(exact(torch.optim.SGD(exact.parameters(), lr=0.1)), rel=0.05)
    assert losses[1] != losses[0]


def test_weights_that_are_swapped_in_place_within_a_call_are_seen(supply):
    """Self-distillation swaps the weights of its average in: its loss was exactly 0."""

    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 64)

        def forward(self, x):
            student = self.net(x)
            with torch.no_grad():
                self.net.weight.mul_(0.5)
                teacher = self.net(x)
                self.net.weight.mul_(2.0)
            return (student - teacher).square().mean()

    assert supply(Distilled())(batch()) > 0


def test_bf16_whatever_autocast_has_by_default(supply):
    """On a GPU that is fp16."""
    model, seen = supply(network()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    default = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        model(batch())
    finally:
        torch.set_autocast_dtype("cpu", default)
    assert seen == [torch.bfloat16]


def test_one_layer_however_often_it_is_supplied(supply):
    model = network()
    for _ in range(3):
        supply(model)
    assert model.__dict__[SLOT].inner is None


def test_where_the_application_autocasts_nothing_is_added(supply):
    """Its outputs are then its own, bf16 ones too; where it forgets to, they are as accelerate's."""
    model = supply(network())
    with autocast_bf16():
        assert model(batch()).dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(batch()).dtype is torch.float16
    output = model(batch())
    assert output.dtype is torch.float32
    assert not is_in_fp32(output)


def test_a_part_that_turns_autocast_off_is_obeyed(supply):
    class Exact(nn.Linear):
        def forward(self, x):
            with autocast_bf16(enabled=False):
                return super().forward(x)

    assert is_in_fp32(supply(Exact(64, 64))(batch()))


def test_the_rest_of_the_job_is_not_under_autocast(supply):
    model, other = supply(network(0)), network(1)
    model(batch())
    assert not torch.is_autocast_enabled("cpu")
    assert is_in_fp32(other(batch()))


def test_random_numbers_are_those_of_the_applications_own_autocast(supply):
    def make():
        return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))

    def dropped(model, call):
        torch.manual_seed(3)
        return [call(batch()) == 0, torch.rand(4)]

    model, reference = supply(make()), make()
    for ours, own in zip(dropped(model, model), dropped(reference, under_own_autocast(reference)), strict=True):
        assert torch.equal(ours, own)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.error = nn.Linear(4, 4), None

    def forward(self, x):
        assert torch.is_autocast_enabled("cpu")
        if self.error:
            raise self.error
        return self.inner(x)


@pytest.mark.parametrize("hooked", [False, True])
def test_an_exception_leaves_nothing_entered(supply, hooked):
    """In ``forward``, a KeyboardInterrupt too."""
    model = supply(Fails())
    if hooked:
        model.register_forward_hook(lambda *args: None)
    before = set(model.__dict__)
    for error in (ValueError, KeyboardInterrupt, None):
        model.error = error
        if error:
            with pytest.raises(error):
                model(torch.ones(2, 4))
        assert not torch.is_autocast_enabled("cpu")
        assert set(model.__dict__) == before
    with torch.no_grad():
        assert model(torch.ones(2, 4)).dtype is torch.float32


@pytest.mark.parametrize("hooked", [False, True])
def test_threads(supply, hooked):
    model = supply(network())
    if hooked:
        model.register_forward_hook(lambda *args: None)
    expected, outputs = model(batch()), []
    threads = [threading.Thread(target=lambda: outputs.extend(model(batch()) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 80
    assert all(torch.equal(expected, one) for one in outputs)
    assert not torch.is_autocast_enabled("cpu")
    assert "forward" not in model.__dict__


def test_keywords_reach_the_model(supply):
    class Scaled(Network):
        def forward(self, x, *, factor):
            return {0: super().forward(x) * factor, "factor": factor}

    model = supply(Scaled(nn.Linear(64, 64)))
    for own in (False, True):
        with autocast_bf16(enabled=own):
            output = model(batch(), factor=2)
        assert output["factor"] == 2
        assert output[0].dtype is (torch.bfloat16 if own else torch.float32)


@pytest.mark.newest
def test_the_memory_of_a_model_is_freed_at_once(supply):
    model = supply(network())
    model(batch())
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


class TestHooks:
    """Those of the application on the model run outside of autocast and see fp32, as under accelerate."""

    def test_each_kind(self, supply):
        model, seen = supply(network()), []
        model.register_forward_pre_hook(lambda module, args: seen.append(("pre", torch.is_autocast_enabled("cpu"))))
        model.register_forward_hook(lambda module, args, output: seen.append((output.dtype, torch.is_autocast_enabled("cpu"))))
        model.register_full_backward_hook(lambda module, grads, outputs: seen.append(("backward", outputs[0].dtype)))
        output = model(batch())
        output.sum().backward()
        assert seen == [("pre", False), (torch.float32, False), ("backward", torch.float32)]
        assert not is_in_fp32(output)
        assert "forward" not in model.__dict__

    def test_a_hook_for_all_modules(self, supply):
        model, seen = supply(network()), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append((module, out.dtype)))
        try:
            model(batch())
        finally:
            handle.remove()
        assert seen[-1] == (model, torch.float32)
        assert seen[0] == (model[0], torch.bfloat16)

    def test_they_get_the_module_and_may_replace_what_goes_through(self, supply):
        model, seen = supply(network()), []
        model.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
        model.register_forward_hook(lambda module, args, output: seen.append(module) or output + 1)
        assert torch.equal(model(batch()), model(batch(5)))
        assert seen == [model, model]

    def test_the_same_output_as_without_a_hook(self, supply):
        model = supply(network())
        expected = model(batch())
        model.register_forward_hook(lambda *args: None)
        assert torch.equal(model(batch()), expected)

    def test_a_forward_of_the_instances_own_is_called_and_stays(self, supply):
        """accelerate, and whoever patches a model, put one there."""
        model = supply(network())
        own = model.forward
        model.forward = lambda x: own(x) * 0
        patched = model.forward
        model.register_forward_hook(lambda *args: None)
        assert not model(batch()).any()
        assert model.forward is patched

    def test_a_forward_that_is_replaced_during_the_call_stays(self, supply):
        """Lightning calls its other steps through the model's forward so."""
        model = supply(network())
        original = model.forward

        def once(x):
            model.forward = original
            return x * 2

        model.register_forward_hook(lambda *args: None)
        model.forward = once
        assert torch.equal(model(batch()), batch() * 2)
        assert model.forward == original

    def test_a_forward_that_calls_itself(self, supply):
        class Twice(nn.Linear):
            def forward(self, x, again=True):
                return self.forward(super().forward(x), False) if again else super().forward(x)

        torch.manual_seed(0)
        model = supply(Twice(64, 64))
        expected = model(batch())
        model.register_forward_hook(lambda *args: None)
        assert torch.equal(model(batch()), expected)

    @pytest.mark.parametrize("where", ["forward", "hook"])
    def test_a_copy_that_is_made_during_the_call_has_its_own_weights(self, supply, where):
        copies = []

        def copy_once(module):
            if not copies:
                copies.append(copy.deepcopy(module))

        class CopiesItself(nn.Linear):
            def forward(self, x):
                if where == "forward":
                    copy_once(self)
                return super().forward(x)

        model = supply(CopiesItself(4, 4))
        if where == "hook":
            model.register_forward_hook(lambda module, args, output: copy_once(module))
        else:
            model.register_forward_hook(lambda *args: None)
        model(torch.ones(2, 4))
        (copied,) = copies
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        assert copied(torch.ones(2, 4)).any()
        assert is_in_fp32(copied(torch.rand(2, 4)))


class TestCopies:
    """They have no trace of the policy and compute with their own weights."""

    @pytest.mark.parametrize("way", ["deepcopy", "copy", "save"])
    def test_without_a_trace(self, supply, way):
        model = supply(network())
        model(batch())
        if way == "save":
            buffer = io.BytesIO()
            torch.save(model, buffer)
            assert b"precision_policy" not in buffer.getvalue()
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        else:
            copied = getattr(copy, way)(model)
        if way != "copy":
            with torch.no_grad():
                model[0].weight.zero_()
                model[3].weight.zero_()
        assert copied.__dict__.get(SLOT) is None
        assert is_in_fp32(copied(batch()))

    def test_of_a_model_with_a_state_of_its_own(self, supply):
        """One whose ``__getstate__`` forgets to leave torch's slot out, as one that was written before torch had it."""

        class Old(nn.Linear):
            def __getstate__(self):
                return dict(self.__dict__)

        copied = copy.deepcopy(supply(Old(64, 64)))
        assert copied.__dict__[SLOT] is None
        assert is_in_fp32(copied(batch()))

    def test_of_a_compiled_model(self, supply):
        model = supply(torch.compile(network(), backend="eager"))
        model(batch())
        assert copy.deepcopy(model)(batch()).dtype is torch.float32

    def test_averages_of_the_weights(self, supply):
        model = supply(network())
        average = torch.optim.swa_utils.AveragedModel(model)
        model(batch())
        average.update_parameters(model)
        assert is_in_fp32(average(batch()))


class TestCompiled:
    """Backend eager: what is tested is where autocast is, not the code that is generated."""

    @pytest.mark.parametrize("way", ["torch.compile(model)", "model.compile()", "model.compile() later"])
    def test_it_computes_in_bf16(self, supply, way):
        torch._dynamo.reset()
        model = network()
        called = torch.compile(model, backend="eager") if way == "torch.compile(model)" else model
        if way == "model.compile()":
            model.compile(backend="eager")
        supply(called)
        optimizer = adamw(model)
        losses = train(model, optimizer, 1, called)
        if way.endswith("later"):
            model.compile(backend="eager")
        losses += train(model, optimizer, 2, called)
        reference = network()
        own, its = under_own_autocast(reference), adamw(reference)
        assert losses == train(reference, its, 1, own) + train(reference, its, 2, own)
        assert called(batch()).dtype is torch.float32
        assert torch.equal(model(batch()), called(batch()))  # also without torch.compile's wrapper, as generate calls it

    def test_what_is_compiled_while_supplied_stays_compiled(self, supply):
        """What is compiled runs under autocast, and is still there when the job ends."""
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        model = supply(network())
        model.compile(backend=backend, dynamic=False)
        output = model(batch())
        assert len(graphs) == 1
        assert output.dtype is torch.float32
        assert not is_in_fp32(output)
        supply.stop()
        compiled = model.__dict__[SLOT]
        assert compiled is not None
        assert torch.allclose(model(batch()), network()(batch()), atol=1e-6)
        assert model.__dict__[SLOT] is compiled
        assert len(graphs) == 2  # compiled anew, without autocast

    def test_what_was_compiled_before_stays_compiled(self, supply):
        model = network()
        model.compile(backend="eager")
        compiled = model.__dict__[SLOT]
        supply(model)(batch())
        assert model.__dict__[SLOT] is not compiled
        supply.stop()
        assert model.__dict__[SLOT] is compiled

    @pytest.mark.parametrize("way", ["torch.compile(model)", "model.compile()", "function"])
    @pytest.mark.newest
    def test_it_is_one_graph(self, supply, way):
        """The call under autocast breaks none: outside of it, inside torch.compile's wrapper, and where a function is traced."""
        torch._dynamo.reset()
        graphs, model = [], network()

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        def function(x):
            return {"logits": model(x), "names": ["a"]}["logits"]

        called = {"torch.compile(model)": model, "function": function}.get(way)
        if called is None:
            model.compile(backend=backend, fullgraph=True)
            called = model
        else:
            called = torch.compile(called, backend=backend, fullgraph=True)
        supply(called if isinstance(called, nn.Module) else model)
        outputs = [called(torch.ones(2, 64)), called(torch.ones(2, 64)), model(torch.ones(2, 64))]
        assert len(graphs) == 1
        assert torch.equal(outputs[0], outputs[2])
        assert not is_in_fp32(outputs[0])
        supply.stop()
        assert not torch.equal(outputs[0], model(torch.ones(2, 64)))

    @pytest.mark.newest
    def test_a_function_that_is_compiled_later_calls_it_under_autocast(self, supply):
        """torch.compile would trace ``forward`` at once, and pass by what is in the slot."""
        torch._dynamo.reset()
        model = supply(network())
        expected = model(batch())
        compiled = torch.compile(lambda x: model(x) * 1, backend="eager", fullgraph=True)
        assert torch.equal(compiled(batch()), expected)
        assert torch.equal(compiled(batch()[:4]), model(batch()[:4]))  # compiled anew, for another size

    def test_the_slot_for_a_compiled_call(self):
        """What this relies on: torch asks the slot before the plain call, and copies leave it out."""
        module = nn.Linear(2, 2)
        assert nn.Module._compiled_call_impl is None
        module.__dict__[SLOT] = lambda *args: "slot"
        assert module(torch.ones(2)) == "slot"
        assert SLOT not in module.__getstate__()
        assert callable(module._call_impl)


class TestExported:
    """A program that outlives the job is the one that it would be without the policy."""

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.newest
    def test_export(self, supply, strict):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = network()

            def forward(self, x):
                return self.inside(x)

        model = Holder()
        plain = torch.export.export(model, (batch(),), strict=strict)
        supply(model)
        supply(model.inside)
        program = torch.export.export(model, (batch(),), strict=strict)
        assert program.graph_module.code == plain.graph_module.code
        assert is_in_fp32(program.module()(batch()))
        assert not is_in_fp32(model(batch()))

    def test_trace(self, supply):
        """Without a warning either: torch compares what was traced with one more call of the model."""
        model = supply(network().eval())
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced = torch.jit.trace(model, batch())
        assert torch.equal(traced(batch()), network()(batch()))
        assert not is_in_fp32(model(batch()))

    def test_script(self, supply):
        model = supply(nn.Sequential(nn.Linear(64, 64)))
        scripted = torch.jit.script(model)
        assert is_in_fp32(scripted(batch()))
        assert "autocast" not in str(scripted.graph)
        assert not is_in_fp32(model(batch()))

    def test_fx(self, supply):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = supply(network())

            def forward(self, x):
                return self.inside(x)

        traced = torch.fx.symbolic_trace(Holder())
        assert "autocast" not in traced.code
        assert is_in_fp32(traced(batch()))


class TestWrappers:
    def test_what_a_wrapper_wraps_is_supplied(self, supply):
        """Evaluation calls it without the wrapper: transformers' Trainer does, and whoever generates from ``model.module``."""
        model, reference = network(), network()
        wrapped = supply(nn.DataParallel(model))  # without a GPU, it calls the model itself
        losses = train(wrapped, adamw(wrapped))
        assert losses == train(reference, adamw(reference), call=under_own_autocast(reference))
        with torch.no_grad():
            output = model(batch())
            assert torch.equal(output, under_own_autocast(reference)(batch()).float())
            assert output.dtype is torch.float32
            supply.stop()
            assert not torch.equal(output, model(batch()))
        assert SLOT not in model.__dict__

    def test_hooks_on_the_model_inside_ddp_see_fp32(self, supply, one_rank):
        """accelerate puts its autocast there, too."""
        model, seen = network(), []
        model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        output = supply(nn.parallel.DistributedDataParallel(model))(batch())
        assert seen == [torch.float32]
        assert not is_in_fp32(output)

    def test_a_replica_of_data_parallel_calls_itself(self, supply):
        """It shares what a module holds, and would call the module's weights, which are on another device."""
        model = supply(network())
        replica = model._replicate_for_data_parallel()
        replica.forward = lambda x: "its own"
        assert replica(batch()) == "its own"
        assert not is_in_fp32(model(batch()))

    @pytest.mark.parametrize("where", ["itself", "inside"])
    def test_data_parallel_over_several_devices_is_an_obstacle(self, where):
        """Mocked: the devices."""
        parallel = nn.DataParallel(network())
        assert autocast.find_obstacle(parallel, "cpu") is None
        parallel.device_ids = [0, 1]
        model = parallel if where == "itself" else nn.Sequential(parallel, nn.Linear(64, 64))
        assert "nn.DataParallel" in autocast.find_obstacle(model, "cpu").why

    def test_a_device_without_autocast_is_an_obstacle(self):
        assert "unsupported autocast device_type 'meta'" in autocast.find_obstacle(network(), "meta").why

    def test_a_gpu_without_bf16_is_an_obstacle(self, monkeypatch):
        """Mocked: a GPU."""
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        assert "does not support bfloat16" in autocast.find_obstacle(network(), "cuda").why


@dataclasses.dataclass
class Post:
    y: torch.Tensor
    made: int = 0

    def __post_init__(self):
        self.made += 1


class Own(dict):
    def __init__(self, tensor):
        super().__init__(y=tensor)


Pair = collections.namedtuple("Pair", "a b")
LOW = torch.ones(2, dtype=torch.bfloat16)


class TestOutputs:
    """Tensors, and containers that torch's pytree knows, come back in fp32; every other object stays the same object."""

    @pytest.mark.parametrize(
        ("output", "tensors"),
        [
            (LOW, lambda out: [out]),
            ([LOW, 1, {"x": (LOW,)}], lambda out: [out[0], out[2]["x"][0]]),
            (Pair(LOW, 1), lambda out: [out.a]),
            (collections.OrderedDict(x=LOW), lambda out: [out["x"]]),
            (collections.defaultdict(list, x=LOW), lambda out: [out["x"]]),
            (collections.deque([LOW]), list),
            (torch.max(torch.ones(2, 2, dtype=torch.bfloat16), 0), lambda out: [out.values]),
        ],
        ids=["tensor", "nested", "namedtuple", "OrderedDict", "defaultdict", "deque", "torch.return_types"],
    )
    def test_containers_keep_their_type(self, output, tensors):
        widened = in_fp32(output)
        assert type(widened) is type(output)
        assert {one.dtype for one in tensors(widened)} == {torch.float32}
        assert {one.dtype for one in tensors(output)} == {torch.bfloat16}

    def test_a_defaultdict_keeps_its_factory(self):
        assert in_fp32(collections.defaultdict(list, x=LOW))["other"] == []

    @pytest.mark.newest
    def test_outputs_of_transformers(self):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        output = in_fp32(CausalLMOutputWithPast(loss=LOW, logits=LOW, hidden_states=(LOW, LOW)))
        assert type(output) is CausalLMOutputWithPast
        assert {output.loss.dtype, output.logits.dtype, output.hidden_states[1].dtype} == {torch.float32}
        assert output["logits"] is output.logits
        assert output.attentions is None

    @pytest.mark.parametrize(
        "output",
        [Post(LOW), Own(LOW), object(), {"a": Post(LOW), "b": [1]}, None, "text"],
        ids=lambda output: type(output).__name__,
    )
    def test_what_pytree_does_not_know_stays_the_same_object(self, output):
        """A dataclass would run its ``__post_init__`` twice; a class with a constructor of its own need not take it at all."""
        assert in_fp32(output) is output

    def test_inside_of_what_is_made_anew_other_objects_are_the_same(self):
        post = Post(LOW)
        widened = in_fp32({"post": post, "y": LOW})
        assert widened["post"] is post
        assert post.made == 1
        assert post.y is LOW

    @pytest.mark.newest
    def test_a_cache_that_a_model_fills_stays_the_same_object(self):
        """Whoever generates gives it in and keeps it."""
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.update(LOW.view(1, 1, 1, 2), LOW.view(1, 1, 1, 2), 0)
        assert in_fp32({"cache": cache, "y": LOW})["cache"] is cache

    def test_only_bf16_is_changed(self):
        same = {
            "x": torch.ones(2),
            "y": [1, "z"],
            "h": torch.ones(2, dtype=torch.float16),
            "i": torch.ones(2, dtype=torch.int8),
        }
        assert in_fp32(same) is same


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.newest
class TestOwnPrecision:
    """The mixed precision that models bring along, by the real libraries."""

    def test_nobodys(self):
        assert autocast.own_precision(network()) is None

    @pytest.mark.parametrize(
        ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"), (None, None)]
    )
    def test_fsdps(self, one_rank, dtype, name):
        """FSDP1 and FSDP2 as they are, on one rank."""
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

        cpu = torch.device("cpu")
        models = []
        for orig in (False, True):
            policy = MixedPrecision(param_dtype=dtype)
            wrapped = FullyShardedDataParallel(network(), mixed_precision=policy, use_orig_params=orig, device_id=cpu)
            models += [wrapped, nn.Sequential(wrapped)]
        models.append(fully_shard(network(), mp_policy=MixedPrecisionPolicy(param_dtype=dtype)))
        for model in models:
            precision = autocast.own_precision(model)
            if name is None:
                assert precision is None
            elif name == "fp32":
                assert precision.name == "FSDP's mixed precision, which names fp32"
                assert precision.dtype is None
                assert precision.obstacle.fix == "name torch.bfloat16 there, as param_dtype"
            else:
                assert precision == autocast.Precision("FSDP's mixed precision", name)
        assert autocast.own_precision(FullyShardedDataParallel(network(), device_id=cpu)) is None

    def test_fsdps_in_a_part(self, one_rank):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        whole = nn.Sequential(network(), nn.Linear(64, 64))
        fully_shard(whole[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        assert autocast.own_precision(whole) == autocast.Precision("FSDP's mixed precision in parts of it", None)

    def test_ddps(self, one_rank):
        model = nn.parallel.DistributedDataParallel(network())
        assert autocast.own_precision(model) is None
        from torch.nn.parallel.distributed import _MixedPrecision

        model.mixed_precision = _MixedPrecision(param_dtype=torch.bfloat16)
        assert autocast.own_precision(model) == autocast.Precision("DDP's mixed precision", "bf16")

    def test_accelerates(self):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState

        for setting, precision in (("bf16", autocast.Precision("accelerate's mixed precision", None)), ("no", None)):
            try:
                prepared = Accelerator(mixed_precision=setting, cpu=True).prepare(network())
                assert autocast.own_precision(prepared) == precision
                whole = nn.Sequential(prepared)
                assert autocast.own_precision(whole) == precision
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
                PartialState._reset_state()

    @pytest.mark.parametrize(
        ("setting", "precision"),
        [
            ("32-true", None),
            ("bf16-mixed", autocast.Precision("Fabric's bf16-mixed", "bf16")),
        ],
    )
    def test_fabrics(self, setting, precision):
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", precision=setting)
        parts = [fabric.setup_module(nn.Linear(8, 8)), fabric.setup_module(nn.Linear(8, 1))]
        assert autocast.own_precision(parts[0]) == precision
        assert autocast.own_precision(nn.Sequential(*parts)) == precision


def test_notes_and_supplies_nothing(supply):
    """What an armed job without ``mixed`` has on the model until the first step."""
    model = network()
    call = supply.note(model, "cpu")
    assert is_in_fp32(model(batch()))
    assert not call.saw_autocast
    with autocast_bf16():
        model(batch())
    assert call.saw_autocast
    assert not call.has_supplied
    supply(model)
    assert not is_in_fp32(model(batch()))
    assert call.has_supplied


def test_a_part_that_is_called_by_itself_first_is_supplied_too(supply):
    """The policy's autocast around the whole is then not taken for the application's in the part."""
    whole = nn.Sequential(network())
    part = supply.note(whole[0], "cpu")
    supply(whole)
    whole(batch())
    assert not part.saw_autocast
