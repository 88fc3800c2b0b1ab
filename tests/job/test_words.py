"""What the job is told, word for word."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from jobs import CHOSEN, NO_MODEL, PEFT, SET, normal, record, step, weights
from torch import nn

from precision_policy.job import holdings, optimizers, words
from precision_policy.job.holdings import Amount
from precision_policy.job.words import Part, Sum

pytest_plugins = ["armed_job"]
pytestmark = pytest.mark.once
ON = "precision_policy=on"


def tensors(*shapes, dtype=torch.bfloat16, size=0.02):
    """Parameters with values from 2^-7 of the size up to it, the same everywhere."""
    made = []
    for shape in shapes:
        values = torch.linspace(size / 128, size, torch.Size(shape).numel()).reshape(shape)
        made.append(nn.Parameter(values.to(dtype)))
    return made


def frozen(params):
    return [p.requires_grad_(False) for p in params]


def adamw(*groups, **options):
    return torch.optim.AdamW([*groups], **{"lr": 1e-5, **options})


def warm_up(rate):
    optimizer = adamw({"params": tensors((64, 64)), "lr": 0.0})
    if rate:
        optimizer.param_groups[0]["initial_lr"] = rate
    return optimizer


def without_a_rate():
    optimizer = adamw({"params": tensors((64, 64))})
    optimizer.param_groups[0]["lr"] = None
    return optimizer


def without_the_key(kind):
    """An older torch has no decoupled_weight_decay in its groups."""
    optimizer = kind(tensors((64, 64)), lr=1e-5, weight_decay=0.01)
    optimizer.param_groups[0].pop("decoupled_weight_decay", None)
    return optimizer


def shard(whole):
    """A mock of FSDP1's parameters by their attributes; real ones are in test_distributed."""
    (param,) = tensors((64, 64))
    param._fsdp_flattened = True
    if whole:
        param._unpadded_unsharded_size = torch.Size([2 * 64 * 64])
    return param


def large(count):
    """A tensor of many elements that takes no memory."""
    return nn.Parameter(torch.empty(1, dtype=torch.bfloat16).expand(count // 1000, 1000), requires_grad=False)


def of_subclass(name, optimizer):
    optimizer.__class__ = type(name, (type(optimizer),), {})
    return optimizer


def read(optimizer, sample=None):
    return holdings.read(optimizer, optimizers.look_up(optimizer), sample)


def settings(text):
    """The lines of a text that are to be typed."""
    return [line.strip() for line in text.splitlines() if re.fullmatch(r"    [+\w.=]+", line)]


def cases():
    """Optimizers by what is peculiar about them."""
    two = {"params": tensors((512, 64), (64,)), "lr": 3e-4}
    other = {
        "params": [*tensors((64, 64), size=1.0), *frozen(tensors((8, 8))), *tensors((4,), dtype=torch.float32)],
        "lr": 1e-3,
    }
    return {
        "one group": adamw({"params": tensors((512, 64), (64,))}, weight_decay=0.01),
        "two groups": adamw(two, other),
        "two groups of one rate": adamw({**two, "lr": 1e-5}, {**other, "lr": 1e-5}),
        "decay that does something": adamw({"params": tensors((64, 64))}, lr=0.1, weight_decay=0.1),
        "decay that does nothing in one of two": adamw(
            {"params": tensors((64, 64)), "weight_decay": 0.1}, {"params": tensors((8,)), "lr": 1.0, "weight_decay": 0.1}
        ),
        "no decay": adamw({"params": tensors((64, 64))}, weight_decay=0.0),
        "Adam": torch.optim.Adam(tensors((64, 64)), lr=1e-5, weight_decay=0.01, amsgrad=True),
        "a warm-up": warm_up(1e-4),
        "a warm-up that does not tell": warm_up(None),
        "a high rate": adamw({"params": tensors((64, 64), size=0.02)}, lr=1e-2),
        "a rate that cannot be read": without_a_rate(),
        "RAdam": torch.optim.RAdam(tensors((64, 64)), lr=1e-5),
        "Adafactor": torch.optim.Adafactor(tensors((64, 64)), lr=1e-5),
        "SGD with momentum": torch.optim.SGD(tensors((64, 64)), lr=1e-5, momentum=0.9),
        "LBFGS": torch.optim.LBFGS(tensors((64, 64)), lr=1e-5),
        "AdamW of an older torch": without_the_key(torch.optim.AdamW),
        "Adam of an older torch": without_the_key(torch.optim.Adam),
        "no weight decay at all": torch.optim.NAdam(tensors((64, 64)), lr=1e-5),
        "a shard": adamw({"params": [shard(True), *tensors((8,))]}),
        "a shard of a whole that is not known": adamw({"params": [shard(False), *tensors((8,))]}),
        "a subclass": of_subclass("Mine", adamw({"params": tensors((8, 8))})),
    }


@pytest.mark.newest
def test_warnings(file_regression):
    """What an optimizer that loses updates is told at its construction."""
    lines = []
    for name, optimizer in cases().items():
        holding = read(optimizer)
        told = words.losing(ON, record(), holding, several=False)
        nearly_nothing = holding.loss is not None and holding.loss.is_nearly_nothing
        lines += [f"{name}: nearly nothing: {nearly_nothing}", told.text, ""]
        assert told.text.startswith(told.short)

    usual = cases()["one group"]

    def warned(what, job, several=False, sample=None, optimizer=usual):
        lines.extend([what, words.losing("precision_policy=strict", job, read(optimizer, sample), several).text, ""])

    warned("a fix that is not known, and a sample", record(NO_MODEL), sample=64)
    warned("a fix that is not known, without master weights", record(NO_MODEL), optimizer=cases()["LBFGS"])
    warned("bf16 is supplied", record(compute_dtype="bfloat16"))
    warned("several models and optimizers", record(CHOSEN, replace(CHOSEN, fix="b.dtype=float32")), several=True)
    warned("a sample of a shard", record(), sample=64, optimizer=cases()["a shard"])
    warned("asked for", record(SET))
    warned("asked for, added", record(replace(SET, added=True), replace(SET, key="b.as_fp32", after=True)))
    warned("asked for, one of several optimizers", record(SET), several=True)
    file_regression.check("\n".join(lines))


@pytest.mark.newest
def test_lines(file_regression):
    """Everything else."""
    made = cases()
    named = ["layer.0", "layer.1", "layer.2"]
    lines = [
        words.not_arrived(ON, record(SET), 4, 5, named),
        words.not_arrived(ON, record(replace(SET, added=True)), 1000, 1234, []),
        words.taken_back(ON, "torch.optim.Adam"),
        words.wasted(ON, "its.Optimizer", 1024 * 1024 + 64),
        words.adapters(ON, record(PEFT), read(made["two groups"])),
        words.adapters(ON, record(replace(PEFT, rule="quantized")), read(made["a high rate"])),
        words.perhaps_adapters(ON, words.losing(ON, record(PEFT, CHOSEN), read(made["RAdam"]), several=False)).text,
        words.refused(ON, read(made["one group"]), {"a reason": 2}).text,
        words.refused(ON, read(made["two groups"]), {"a reason": 1, "another": 1}).text,
        words.summed_up(ON, [read(made["one group"]), read(made["a warm-up"])], Amount(3, 36_928)),
        words.summed_up(ON, [read(made["RAdam"]), read(made["Adafactor"])], Amount(1, 1000, True)),
        words.monitored(ON, "torch.optim.AdamW", 12_000, 1, 3, "1e-05, 0.001", False),
        words.monitored(ON, "torch.optim.AdamW", 1, 65_536, 65_536, "1e-05", True),
    ]
    for elements in (1000, 999_000, 1_000_000, 999_000_000, 1_234_567_000, 1_100_048_000_000):
        part = {Part("fp32", "", ""): Sum(Amount(1, elements))}
        lines.append(words.confirmed(ON, part, 1, {"uint8": Amount(2, 3 * elements, True)}, ""))
    compute = [
        *product((None, "bf16"), (None, words.APPLICATIONS, words.POLICYS)),
        (None, words.NOBODY),
        (None, words.LEFT_ALONE),
    ]
    for computed, by in compute:
        part = {Part("fp32", words.updated_in("fp32"), words.computed_in(computed, by)): Sum(Amount(2, 64))}
        lines.append(words.confirmed(ON, part, 1, {}, ""))
    lines += [words.slow(ON, "NVIDIA H200", "cuda", is_tf32) for is_tf32 in (False, True)]
    lines += [words.not_supplied(ON, "bfloat16", "a reason", fix) for fix in ("", "do something")]
    lines.append(words.not_called(ON, "bfloat16", "cuda"))
    file_regression.check("\n".join(lines))


def test_sizes():
    sizes = [0, 999, 1000, 1024, 1023_000, 1000 * 2**10, 1000 * 2**20, 1000 * 2**30, 2**50]
    assert [words._bytes(size) for size in sizes] == [
        *("0 B", "999 B", "0.9766 KiB", "1 KiB", "999 KiB", "0.9766 MiB", "0.9766 GiB", "1000 GiB", "1.049e+06 GiB")
    ]


def test_numbers_of_elements():
    """The unit is that of the number as it is shown."""
    told = {
        999_999: "999,999 elements",
        1_000_000: "1 M elements",
        999_499_999: "999 M elements",
        999_700_000: "1 B elements",
        12_345_000_000: "12.3 B elements",
        999_700_000_000: "1,000 B elements",
        1_234_567_000_000: "1,235 B elements",
    }
    assert {count: words._elements(Amount(1, count)) for count in told} == told


def test_it_says_what_it_must(armed, said):
    """Class, tensors, elements, shares, decay, cost and fix, in one record whose first line is short."""
    torch.optim.AdamW(weights(count=3), lr=1e-5, weight_decay=0.01)
    (text,) = said()
    first, *rest = text.splitlines()
    assert len(first) < 124
    assert first.startswith("precision_policy=on: ")
    assert "torch.optim.AdamW" in first
    assert "100.0%" in first
    assert any("3 trainable tensors (48 elements)" in line for line in rest)
    assert any("weight decay does nothing at this rate" in line for line in rest)
    assert "fp32 storage adds: weights 96 B, gradients 96 B, optimizer state 192 B" in text
    assert "master weights add: low bits 96 B, optimizer state 192 B" in text
    assert text.count("not counted: ") == 2
    assert not re.search(r"Kahan|inert|2\^-9|optimi\b", text)


def test_it_reads_top_down(armed, said):
    """What happens, the fix, what that costs, then the table."""
    armed_lines = [
        "precision_policy=on: torch.optim.AdamW over",
        "  a bf16 weight has 8 significant bits",
        "  fix, by fp32 master weights",
        "    precision_policy.master_weights=true",
        "  or, to store the model in fp32:",
        "    model.dtype=float32",
        "  master weights add",
        "    not counted",
        "  fp32 storage adds",
        "    not counted",
        "  1 trainable tensor (4,096",
        "  weights that",
    ]
    torch.optim.AdamW([normal()], lr=1e-5)
    lines = said()[0].splitlines()
    assert [line[: len(start)] for line, start in zip(lines, armed_lines, strict=False)] == armed_lines
    assert " %" not in said()[0]


def test_the_fixes_of_several_models(arm, said):
    """Each setting on a line of its own: it survives a handler that wraps, and can be pasted as it is."""
    arm(record(CHOSEN, replace(CHOSEN, fix="+b.dtype=float32")))
    torch.optim.AdamW(weights(), lr=1e-5)
    assert settings(said()[0]) == ["precision_policy.master_weights=true", "model.dtype=float32", "+b.dtype=float32"]


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ({"lr": 0.0}, "at lr 1e-05 (assumed; lr is 0 now)"),
        ({"lr": 0.0, "initial_lr": 3e-6}, "at lr 3e-06 (initial_lr; lr is 0 now)"),
        ({"lr": torch.tensor(1e-5)}, "at lr 1e-05"),
    ],
)
def test_the_learning_rate_that_the_figures_are_for(armed, said, group, told):
    torch.optim.AdamW([{"params": [normal()], **group}])
    first, *rest = said()[0].splitlines()
    (head,) = [line for line in rest if line.startswith("  weights that an update cannot move")]
    assert told in first
    assert told in head


def test_meta_parameters(armed, said):
    """They hold no values to estimate from; the warning comes without that table."""
    params = [nn.Parameter(torch.ones(4, device="meta", dtype=torch.bfloat16))]
    torch.optim.AdamW(params, lr=1e-5)
    (text,) = said()
    assert "weights that an update cannot move" not in text
    assert "1 trainable tensor (4 elements) stored in bf16" in text


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Adamax])
@pytest.mark.parametrize("lr", [3e-6, 1e-5, 1e-4, 3e-4])
def test_the_first_step_of_others(kind, lr, foreach):
    """The share that the warning gives is within half a point of what a real first step leaves unchanged."""
    generator = torch.Generator().manual_seed(0)
    before = (torch.randn(300_000, generator=generator) * 0.02).to(torch.bfloat16)
    param = nn.Parameter(before.clone())
    param.grad = torch.randn(300_000, generator=generator).to(torch.bfloat16)
    optimizer = kind([param], lr=lr, foreach=foreach)
    loss = read(optimizer).loss
    optimizer.step()
    assert loss.now == pytest.approx((param.data == before).double().mean().item(), abs=0.005)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_what_fp32_storage_adds_is_counted(name):
    """The state is what real steps made of it."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    made = {
        dtype: getattr(torch.optim, name)([normal(64, 64, dtype=dtype)], lr=1e-3, **options)
        for dtype in (torch.bfloat16, torch.float32)
    }
    cost = read(made[torch.bfloat16]).cost
    bytes_of = {}
    for dtype, optimizer in made.items():
        step(optimizer)
        (state,) = optimizer.state.values()
        bytes_of[dtype] = sum(value.nbytes for value in state.values() if value.numel() > 1)
    assert cost.state == bytes_of[torch.float32] - bytes_of[torch.bfloat16]
    assert (cost.weights, cost.gradients, cost.low_bits) == (8192, 8192, 8192)
