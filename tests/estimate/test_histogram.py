"""The estimate against exact arithmetic and against real optimizer steps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_policy.estimate.histogram import FORMATS, Histogram, histogram, lost_updates, stride

pytestmark = pytest.mark.once
BITS = {torch.bfloat16: 8, torch.float16: 11}
MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def exactly_lost(weights: torch.Tensor, update: float) -> torch.Tensor:
    """Whether an update away from zero leaves a weight bit-identical, in exact arithmetic; ties are left out by callers."""
    magnitudes = weights.abs().double()
    next_up = (weights.abs().view(torch.int16) + 1).view(weights.dtype).double()
    return update < (next_up - magnitudes) / 2


def finite(dtype):
    """Any finite weight, by its bits, powers of two among them often."""
    top = 0x7F7E if dtype is torch.bfloat16 else 0x7BFE
    power = st.integers(0, top >> MANTISSA[dtype]).map(lambda e: e << MANTISSA[dtype])
    return st.one_of(st.integers(0, top), power).flatmap(lambda bits: st.sampled_from([bits, bits - 0x8000]))


@pytest.mark.parametrize("dtype", sorted(FORMATS, key=str))
@settings(max_examples=200)
@given(data=st.data())
def test_exact_on_any_bits(dtype, data):
    """The share is exact for updates away from zero, at any exponent, subnormals and powers of two included."""
    bits = data.draw(st.lists(finite(dtype), min_size=1, max_size=50))
    update = data.draw(st.floats(1e-30, 1e3))
    weights = torch.tensor(bits, dtype=torch.int16).view(dtype)
    counted = histogram([weights], dtype)
    assert counted.seen == len(bits)
    assert counted.lost(update) == pytest.approx(exactly_lost(weights, update).double().mean().item(), abs=1e-12)


@settings(max_examples=100)
@given(exponent=st.integers(-30, 10), power=st.integers(-60, 0))
def test_powers_of_two(exponent, power):
    """At a power of two the step towards zero is half as large: lost at most until twice that."""
    weights = torch.full((4,), 2.0**exponent).to(torch.bfloat16)
    update = 2.0**power
    lost = histogram([weights], torch.bfloat16).lost(update)
    down = (weights.double() - update).to(torch.bfloat16) == weights
    assert lost == (1.0 if update < 2.0 ** (exponent - 8) else 0.0)
    if not lost:
        assert update >= 2.0 ** (exponent - 8)
    elif not down.all():
        assert update >= 2.0 ** (exponent - 9)


WAYS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


def first_step(weights: torch.Tensor, gradients: torch.Tensor, lr: float, **way) -> float:
    param = torch.nn.Parameter(weights.clone())
    param.grad = gradients
    torch.optim.AdamW([param], lr=lr, **way).step()
    return (param.data == weights).double().mean().item()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("lr", [3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_first_step_on_random_weights(way, lr, dtype):
    """Within half a percentage point of what AdamW's first step leaves bit-identical."""
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(200_000, generator=generator) * 0.02).to(dtype)
    weights[:2000] = 1.0  # norm weights
    gradients = torch.randn(200_000, generator=generator).to(dtype)
    estimated = histogram([weights], dtype).lost(lr)
    assert estimated == pytest.approx(first_step(weights, gradients, lr, **way), abs=0.005)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_first_step_on_real_weights(way, checkpoint):
    """The same on a transformers checkpoint, gradients from its own loss; parameters that got none are not moved at all."""
    from transformers import AutoModelForCausalLM

    for lr in (3e-6, 1e-5, 1e-4, 1e-3):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        tokens = torch.randint(0, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
        model(input_ids=tokens, labels=tokens).loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        (group,) = lost_updates([{"params": list(model.parameters()), "lr": lr}])
        moved = [p.grad.abs() > 1e-6 for p in model.parameters()]  # far above Adam's eps, which shrinks the update
        expected = [histogram([b[m]], torch.bfloat16) for b, m in zip(before, moved, strict=True)]
        total = sum(h.seen for h in expected)
        estimated = sum(h.lost(lr) * h.seen for h in expected) / total
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, **way).step()
        same = sum(int(((p == b) & m).sum()) for p, b, m in zip(model.parameters(), before, moved, strict=True))
        assert estimated == pytest.approx(same / total, abs=0.005)
        assert group.histogram.seen == sum(b.numel() for b in before)


def test_a_later_update_of_adam_can_exceed_lr():
    """An element that has its first gradient at step 2,000 is moved by 2.94 lr, as the module says."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=1e-3, foreach=False)
    weight.grad = torch.zeros_like(weight)
    for _ in range(1999):
        optimizer.step()
    assert weight.item() == 0.0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert abs(weight.item()) == pytest.approx(2.94e-3, rel=0.01)


@pytest.mark.parametrize("kind", ["foreach", "fused", "loop"])
def test_weight_decay_does_nothing_below_its_bound(kind):
    """lr * weight_decay under 2**-9 leaves every bf16 weight bit-exact, as the warning says."""
    way = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}[kind]
    weights = (torch.randn(10_000) * 0.02).to(torch.bfloat16)
    param = torch.nn.Parameter(weights.clone())
    param.grad = torch.zeros_like(param)
    torch.optim.AdamW([param], lr=1e-3, weight_decay=1.9, **way).step()
    assert torch.equal(param.data, weights)


def test_sampling_is_even_and_said():
    weights = [torch.nn.Parameter((torch.randn(n) * 0.02).to(torch.bfloat16)) for n in (1_000_000, 500_000, 10)]
    (whole,) = lost_updates([{"params": weights, "lr": 1e-4}])
    (sampled,) = lost_updates([{"params": weights, "lr": 1e-4}], sample=50_000)
    assert not whole.histogram.sampled
    assert sampled.histogram.sampled
    assert sampled.histogram.seen <= 50_010
    assert sampled.histogram.total == whole.histogram.total == 1_500_010
    assert sampled.lost == pytest.approx(whole.lost, abs=0.01)


def test_layouts_without_copies():
    """Transposed, sliced and channels-last parameters are counted whole."""
    base = (torch.randn(4, 6, 8, 10) * 0.02).to(torch.bfloat16)
    for view in (
        base.transpose(0, 2),
        base.to(memory_format=torch.channels_last),
        base[:, ::2],
        base[..., 3],
        base[:, :, 1:5, 2:7],
    ):
        counted = histogram([view], torch.bfloat16)
        assert counted.counts == histogram([view.contiguous()], torch.bfloat16).counts
        assert counted.seen == view.numel()


@pytest.mark.parametrize(
    "params",
    [
        [],
        [torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))],
        [torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))],
        [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device="meta"))],
        [torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16).to_sparse())],
        [torch.nn.Parameter(torch.tensor([math.inf, math.nan, 0.0]).to(torch.bfloat16))],
    ],
    ids=["none", "empty", "scalar", "meta", "sparse", "not finite"],
)
@pytest.mark.parametrize("lr", [0, 0.0, 1e-5, torch.tensor(1e-5), torch.ones(2), torch.ones(1, device="meta"), math.nan, None])
def test_never_raises(params, lr):
    for sample in (None, 1):
        for estimate in lost_updates([{"params": params, "lr": lr}, {"params": []}], sample):
            assert 0.0 <= estimate.lost <= 1.0


def test_what_cannot_be_read_is_in_no_figure():
    params = [torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="meta")) for size in ((4, 4), (3,))]
    (group,) = lost_updates([{"params": params, "lr": 1e-5}])
    assert (group.lost, group.histogram.total, group.kinds) == (0.0, 0, {})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_sample_is_as_large_on_any_device(device):
    """2**26 elements, unless told otherwise."""
    params = [torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device=device)) for size in ((4, 4), (3,))]
    assert stride(params, None) == 1
    assert stride(params, 10) == 2
    many = torch.nn.Parameter(torch.empty(1, dtype=torch.bfloat16, device=device).expand(3, 2**26))
    assert stride([many], None) == 3


def test_what_cannot_be_read_hides_nothing_after_it():
    meta = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in (3, 5)]
    counted = histogram([meta[0], torch.ones(7, dtype=torch.bfloat16), meta[1]], torch.bfloat16)
    assert (counted.counts[127], counted.total) == (7, 7)


def test_frozen_and_fp32_are_no_part():
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)]
    assert lost_updates([{"params": params, "lr": 1e-5}]) == []


def test_one_histogram_answers_every_rate():
    counted = Histogram(torch.bfloat16)
    counted.counts[127] = 3  # [1, 2)
    counted.counts[120] = 1
    assert [counted.lost(lr) for lr in (0.0, 2**-9, 2**-8, 2**-15, 1.0)] == [1.0, 0.75, 0.0, 0.75, 0.0]


@pytest.mark.parametrize("exponent", [1, 100, 126, 127, 254])
def test_the_rate_that_loses_a_share(exponent):
    """Weights of one exponent are lost below half a step of it, and the rate told is a power of two."""
    counted = Histogram(torch.bfloat16)
    assert counted.rate_losing(0.1) == 0.0
    counted.counts[exponent], counted.counts[0] = 1, 9
    assert counted.rate_losing(0.1) == 2.0 ** (exponent - 127 - 8)
    assert counted.rate_losing(0.11) == 2.0 ** (1 - 127 - 8)
    assert counted.rate_losing(1.1) == 0.0


def test_the_rate_that_loses_a_share_of_several_exponents():
    """What is larger is lost as well; subnormals count with the smallest normal numbers."""
    counted = Histogram(torch.bfloat16)
    counted.counts[130], counted.counts[127], counted.counts[0] = 1, 1, 2
    assert counted.rate_losing(0.25) == 2.0 ** (130 - 127 - 8)
    assert counted.rate_losing(0.5) == 2.0 ** (127 - 127 - 8)
    assert counted.rate_losing(1.0) == 2.0 ** (1 - 127 - 8)


def test_dtensor_is_read_locally(tmp_path):
    """A sharded parameter is counted by this process's shard, without waiting for the others."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        weights = (torch.randn(64, 64) * 0.02).to(torch.bfloat16)
        param = torch.nn.Parameter(distribute_tensor(weights, mesh, [Shard(0)]))
        (group,) = lost_updates([{"params": [param], "lr": 1e-5}])
        assert group.histogram.seen == 64 * 64
        assert group.lost == histogram([weights], torch.bfloat16).lost(1e-5)
    finally:
        dist.destroy_process_group()
