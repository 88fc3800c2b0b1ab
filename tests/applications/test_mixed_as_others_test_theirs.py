"""What accelerate's and Lightning's own tests check of mixed precision on a CPU, with ``mixed`` in the place of their setting.

Their ideas, written anew; ``docs/frameworks.md`` has them in a table.
"""

import pickle
from typing import NamedTuple

import pytest
import torch
from networks import adamw, autocast_bf16, batch, is_in_fp32, network, watching
from torch import nn

from precision_policy.job.autocast import in_fp32

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def as_it_was():
    """What the libraries keep for the process, they keep for no other test."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)


class Regression(nn.Module):
    """Nothing that autocast casts; accelerate trains it to see that mixed precision leaves such a model alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.a + self.b


class TestAccelerate:
    def test_a_model_without_anything_to_cast_trains_to_the_same_weights(self):
        def trained():
            model = Regression()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for number in range(12):
                x = batch(number)[:, :1]
                nn.functional.mse_loss(model(x), 2 * x + 3).backward()
                optimizer.step()
                optimizer.zero_grad()
            return model

        plain = trained()
        with watching():
            model = trained()
        assert torch.equal(model.a, plain.a)
        assert torch.equal(model.b, plain.b)

    def test_an_unwrapped_model_still_computes_under_autocast(self, one_rank):
        """And so takes 16-bit inputs, which its fp32 weights alone would not."""
        with watching():
            model = nn.parallel.DistributedDataParallel(network())
            model(batch()).sum().backward()
            optimizer = adamw(model)
            model(batch())
            assert model.module(batch().bfloat16()).dtype is torch.float32
            optimizer.step()
        with pytest.raises(RuntimeError):
            model.module(batch().bfloat16())

    @pytest.mark.parametrize("ended", [False, True])
    def test_a_model_can_be_pickled(self, ended):
        model = network()
        with watching():
            optimizer = adamw(model)
            model(batch())
            if not ended:
                pickled = pickle.dumps((model, optimizer))
        if ended:
            pickled = pickle.dumps((model, optimizer))
        assert b"precision_policy" not in pickled
        assert is_in_fp32(pickle.loads(pickled)[0](batch()))

    def test_a_forward_under_autocast_can_be_compiled(self):
        torch._dynamo.reset()
        with watching():
            model = network()
            optimizer = adamw(model)
            model.forward = torch.compile(model.forward, backend="eager")
            output = model(batch())
            output.sum().backward()
            optimizer.step()
        assert output.dtype is torch.float32
        assert not is_in_fp32(output)

    def test_the_conversion_of_outputs_can_be_compiled(self):
        torch._dynamo.reset()
        convert = torch.compile(in_fp32, backend="eager", fullgraph=True)
        assert convert({"y": [torch.zeros(1, dtype=torch.bfloat16)]})["y"][0].dtype is torch.float32

    def test_the_model_is_the_one_that_was_wrapped(self):
        from accelerate.utils import extract_model_from_parallel

        with watching():
            model = network()
            wrapped = nn.DataParallel(model)
            optimizer = adamw(wrapped)
            wrapped(batch())
            assert extract_model_from_parallel(wrapped) is model
            assert extract_model_from_parallel(torch.compile(model)) is not None
            optimizer.step()

    def test_a_region_without_autocast_inside(self):
        seen = []

        class Region(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(64, 64)

            def forward(self, x):
                low = x @ x.T
                with autocast_bf16(enabled=False):
                    exact = x @ x.T
                seen.extend([low.dtype, exact.dtype, (x @ x.T).dtype])
                return self.layer(x)

        with watching():
            model = Region()
            optimizer = adamw(model)
            model(batch())
            optimizer.step()
        assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]

    def test_named_tuples_keep_their_type(self):
        """Of a class that is made by torch's pytree from its fields; one that derives from such a class stays as it is."""

        class Scaled(NamedTuple):
            value: torch.Tensor
            scale: torch.Tensor | None

        class Derived(Scaled):
            pass

        low = torch.ones(1, dtype=torch.bfloat16)
        widened = in_fp32(Scaled(low, None))
        assert type(widened) is Scaled
        assert widened.value.dtype is torch.float32
        derived = Derived(low, None)
        assert in_fp32(derived) is derived

    def test_saved_and_loaded_states_are_the_same(self, tmp_path):
        from accelerate import Accelerator

        with watching():
            accelerator = Accelerator(cpu=True)
            model = network()
            model, optimizer = accelerator.prepare(model, adamw(model))
            accelerator.backward(model(batch()).square().mean())
            optimizer.step()
            accelerator.save_state(str(tmp_path))
            expected = model(batch())
            with torch.no_grad():
                model[0].weight.zero_()
            accelerator.load_state(str(tmp_path))
            assert torch.equal(model(batch()), expected)

    def test_accumulated_gradients_are_those_of_one_batch(self):
        """To the precision of bf16; in fp32, as the weights."""
        from accelerate import Accelerator

        with watching():
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            model = network()
            model, optimizer = accelerator.prepare(model, adamw(model))
            for half in batch().chunk(2):
                with accelerator.accumulate(model):
                    accelerator.backward(model(half).square().mean())
            accumulated = model[0].weight.grad.clone()
            optimizer.zero_grad()
            model(batch()).square().mean().backward()
            assert accumulated.dtype is torch.float32
            assert torch.allclose(accumulated, model[0].weight.grad, rtol=0.05, atol=1e-4)

    def test_hooks_that_replace_forward(self):
        """accelerate's hooks, which offload weights and align devices."""
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        seen = []

        class Notes(ModelHook):
            def post_forward(self, module, output):
                seen.append(output.dtype)
                return output

        with watching():
            model = network()
            optimizer = adamw(model)
            add_hook_to_module(model, Notes())
            hooked = model(batch())
            remove_hook_from_module(model)
            assert torch.equal(model(batch()), hooked)
            optimizer.step()
        assert seen == [torch.bfloat16]  # a part of forward for torch, and so inside


class Boring(nn.Module):
    """What Lightning's tests look at, inside and outside of ``forward``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 2)

    def forward(self, x):
        assert torch.is_autocast_enabled("cpu")
        assert x.dtype is torch.float32
        output = self.layer(x)
        assert output.dtype is torch.bfloat16
        return output


class TestLightning:
    def test_dtypes_of_a_step(self):
        """Weights, inputs, outputs and gradients in fp32; products inside in bf16."""
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu")
        with watching():
            model = Boring()
            model, optimizer = fabric.setup(model, adamw(model))
            output = model(batch())
            assert output.dtype is torch.float32
            fabric.backward(nn.functional.mse_loss(output, torch.ones_like(output)))
            assert model.layer.weight.dtype is model.layer.weight.grad.dtype is torch.float32
            optimizer.step()

    @pytest.mark.parametrize("strategy", ["auto", "ddp"])
    def test_fit_validate_test_and_predict(self, strategy, tmp_path):
        """Each step's ``self.net(batch)`` is under autocast. After a fit under DDP, Lightning calls the others as methods of a
        module that had been called as a whole, so they are in fp32, as under accelerate.
        """
        import lightning

        steps = set()

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(64, 2)
                self.net.register_forward_hook(self.note)

            def note(self, module, args, output):
                steps.add((self.trainer.state.fn.value, not is_in_fp32(output)))

            def look(self, x, *_):
                return self.net(x).float().sum()

            training_step = validation_step = test_step = predict_step = look

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        data = torch.utils.data.DataLoader(batch(), batch_size=16)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=1, **quiet)
        with watching():
            module = Module()
            trainer.fit(module, data, data)
            trainer.validate(module, data)
            trainer.test(module, data)
            trainer.predict(module, data)
        alone = strategy == "auto"
        assert steps == {("fit", True), ("validate", alone), ("test", alone), ("predict", alone)}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.long, torch.bool])
    def test_what_goes_through_untouched_keeps_its_dtype(self, dtype):
        """Lightning casts inputs as well; accelerate, autocast and so ``mixed`` leave them."""

        class Passes(nn.Linear):
            def forward(self, x):
                return x, super().forward(batch())

        with watching():
            model = Passes(64, 64)
            optimizer = adamw(model)
            same, computed = model(torch.ones(3).to(dtype))
            assert same.dtype is dtype
            assert computed.dtype is torch.float32
            optimizer.step()

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_a_part_without_gradients_takes_none_from_the_rest(self, context):
        """Autocast's cache would keep casts of the weights that have no gradient."""

        class Twice(nn.Linear):
            def forward(self, x):
                with context():
                    super().forward(x)
                return super().forward(x)

        with watching():
            model = Twice(64, 64)
            optimizer = adamw(model)
            model(batch()).sum().backward()
            assert model.weight.grad is not None
            optimizer.step()

    def test_a_fused_optimizer_trains_to_the_same_weights(self):
        def trained(fused):
            with watching():
                model = network()
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
                for number in range(5):
                    model(batch(number)).abs().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            return list(model.parameters())

        for plain, fused in zip(trained(False), trained(True), strict=True):
            torch.testing.assert_close(plain, fused)

    def test_an_optimizer_that_calls_its_closure_several_times(self):
        with watching():
            model = network()
            optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
            losses = []

            def closure():
                optimizer.zero_grad()
                loss = model(batch()).square().mean()
                loss.backward()
                losses.append(loss.item())
                return loss

            optimizer.step(closure)
        assert losses[-1] < losses[0]
        assert len(set(losses)) > 2  # each call sees the weights of its time

    @pytest.mark.parametrize("clip", [0, 0.1])
    def test_clipped_gradients_and_skipped_steps(self, clip):
        import lightning

        norms = []

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = Boring()

            def training_step(self, x, index):
                return None if index % 2 else 100 * self.net(x).sum()

            def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
                gradient = self.net.layer.weight.grad
                if gradient is not None:  # the step was not skipped
                    norms.append(gradient.norm().item())

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=1e-3)

        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True, gradient_clip_val=clip)
        with watching() as seen:
            trainer.fit(Module(), torch.utils.data.DataLoader(batch(), batch_size=8))
            assert len(seen._gradients) == 0
        assert len(norms) == 2
        assert (max(norms) <= 0.11) is bool(clip)

    def test_its_own_precision_is_left_to_it(self):
        """And the losses are those that its ``bf16-mixed`` gives."""
        from lightning.fabric import Fabric

        def losses(precision):
            torch.manual_seed(0)
            fabric, model = Fabric(accelerator="cpu", precision=precision), network()
            model, optimizer = fabric.setup(model, adamw(model))
            found = []
            for number in range(3):
                loss = model(batch(number)).square().mean()
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            return found

        expected = losses("bf16-mixed")
        with watching():
            assert losses("bf16-mixed") == expected
        with watching():
            assert losses("32-true") == expected
