"""What the watch says, word for word, compared with the text that is kept beside this file (``--force-regen`` writes it anew)."""

from itertools import product

import pytest
import torch
from torch import nn

from precision_policy.job import message, optimizers, plan

pytestmark = pytest.mark.once


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


def test_messages(file_regression):
    """What the watch says, word for word."""
    two = {"params": tensors((512, 64), (64,)), "lr": 3e-4}
    other = {
        "params": [*tensors((64, 64), size=1.0), *frozen(tensors((8, 8))), *tensors((4,), dtype=torch.float32)],
        "lr": 1e-3,
    }
    named = adamw({"params": [(f"layer.{n}", p) for n, p in enumerate(tensors((16, 16), (16, 16), (16,), (16,)))]})
    cases = {
        "one group": adamw({"params": tensors((512, 64), (64,))}, weight_decay=0.01),
        "two groups": adamw(two, other),
        "two groups of one rate": adamw({**two, "lr": 1e-5}, {**other, "lr": 1e-5}),
        "decay that is not inert": adamw({"params": tensors((64, 64))}, lr=0.1, weight_decay=0.1),
        "decay inert in one of two": adamw(
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
        "names": named,
        "AdamW of an older torch": without_the_key(torch.optim.AdamW),
        "Adam of an older torch": without_the_key(torch.optim.Adam),
        "no weight decay at all": torch.optim.NAdam(tensors((64, 64)), lr=1e-5),
        "a shard": adamw({"params": [shard(True), *tensors((8,))]}),
        "a shard of a whole that is not known": adamw({"params": [shard(False), *tensors((8,))]}),
        "a subclass": of_subclass("Mine", adamw({"params": tensors((8, 8))})),
    }
    usual = plan.Plan("precision_policy=on", fix="model.dtype=float32")
    lines = []
    for name, optimizer in cases.items():
        known, low = optimizers.look_up(optimizer), message.low_precision(optimizer)
        told = message.warning(optimizer, known, low, usual)
        lines += [f"{name}: nearly nothing: {told.nearly_nothing}", told.text, ""]
        assert told.text.startswith(told.short)
        assert told.short.count("\n") == 1

    def warned(what, optimizer, **options):
        todo = plan.Plan("precision_policy=strict", **options)
        text = message.warning(optimizer, optimizers.look_up(optimizer), message.low_precision(optimizer), todo)
        lines.extend([what, text.text, ""])

    warned("a fix that is not known, a sample", cases["one group"], sample=64)
    warned("bf16 is supplied", cases["one group"], compute_dtype="bfloat16", fix="a.dtype=float32 b.dtype=float32")
    warned("a sample of a shard", cases["a shard"], sample=64)
    warned("asked for", named, asked="model.dtype=float32")
    warned("asked for, added, and some arrived", cases["two groups"], asked="model.dtype=float32", added=True)

    sizes = (1000, 999_000, 1_000_000, 999_000_000, 1_234_567_000, 1_100_048_000_000)
    holders = [adamw({"params": [large(n)]}, lr=0.1) for n in sizes]
    for optimizer in holders:
        for param in optimizer.param_groups[0]["params"]:
            param.requires_grad_(True)
        lines.append(message.holds(optimizer, usual))
    lines.append(message.holds(cases["two groups"], usual))
    lines.append(message.holds(cases["a shard of a whole that is not known"], usual))
    lines.append(message.taken_back(cases["Adam"], usual))
    fp32 = adamw({"params": [*tensors((1024, 1024), (64,), dtype=torch.float32), *frozen(tensors((9,), dtype=torch.float32))]})
    lines.append(message.wasted(fp32, usual))
    assert message.wasted(cases["one group"], usual) is None
    for computed, by in product((None, "bf16", "TF32"), (None, "the application's autocast")):
        lines.append(message.confirmed(fp32, usual, computed, by))
    lines.append(message.confirmed(cases["two groups"], usual, "bf16", None))
    lines += [message.slow(usual, kind, "NVIDIA H200", "cuda") for kind in ("fp32", "TF32", None)]
    mixed = plan.Plan("precision_policy=mixed", compute_dtype="bfloat16")
    lines += [message.not_supplied(mixed, "TF32", by) for by in (None, "the application's autocast")]
    file_regression.check("\n".join(lines))


def test_sizes():
    sizes = [0, 999, 1000, 1024, 1023_000, 1000 * 2**10, 1000 * 2**20, 1000 * 2**30, 2**50]
    assert [message._bytes(size) for size in sizes] == [
        *("0 B", "999 B", "0.9766 KiB", "1 KiB", "999 KiB", "0.9766 MiB", "0.9766 GiB", "1000 GiB", "1.049e+06 GiB")
    ]
