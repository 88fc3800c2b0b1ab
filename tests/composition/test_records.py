"""Whole records and texts, compared with those that are kept beside this file: `pytest tests/test_records.py --force-regen`.

One test for many cases, since they are read as one: what the policy decides and says, word for word.
"""

from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from precision_policy.__main__ import main, plot
from precision_policy.composition.applying import apply
from precision_policy.composition.decision import DtypeField, Facts, ModelFacts, OptimizerFacts, decide
from precision_policy.composition.settings import NODE, SettingError, Settings
from precision_policy.estimate.checkpoint import summarize
from precision_policy.job import message, optimizers, plan

pytestmark = pytest.mark.once
HERE = Path(__file__).parent


def differences(record, usual):
    """What differs from the usual values, one per line."""
    return [f"  {key}: {value}" for key, value in record.items() if value != usual[key]]


USUAL_DECISION = {**asdict(decide(Facts("no", "no"))), "rule": "", "reason": ""}
USUAL_SETTINGS = Settings().as_dict()


def applied(config, settings, overrides):
    """The config with its record, or what was raised."""

    def compose(more):
        chosen = {word.removeprefix(f"{NODE}."): value for word, _, value in (one.partition("=") for one in more)}
        return OmegaConf.create({**config, NODE: {**settings, **chosen, "decision": None}})

    cfg = OmegaConf.create({**config, NODE: {"decision": None, **settings}})
    apply(cfg, overrides, compose)
    return cfg


def recorded(case):
    """What a case of the YAML files leads to, in lines."""
    config, settings = case["config"], case.get("settings", {})
    before = OmegaConf.create(config)
    try:
        cfg = applied(config, settings, case.get("overrides", []))
    except SettingError as error:
        return ["  error", *(f"  {line}" for line in str(error).splitlines())]
    node = OmegaConf.to_container(cfg.pop(NODE))
    lines = [f"  setting {line.strip()}" for line in differences(node, USUAL_SETTINGS | {"decision": node["decision"]})]
    for one in plan.decisions(node) if node["decision"] else ():
        level = "WARNING" if plan.found_nothing(one) else "INFO"
        told = {key: value for key, value in one.items() if key not in ("rule", "before", "after", "reason")}
        lines += [f"  {level} {plan.line(one)}", *(f"  {line}" for line in differences(told, USUAL_DECISION))]
    if node["decision"]:
        lines += [f"  job {line.strip()}" for line in differences(asdict(plan.read(node, "on")), asdict(plan.Plan("on")))]
    if cfg != before:
        lines.append(f"  config: {OmegaConf.to_container(cfg)}")
    return [line for line in lines if line]


@pytest.mark.parametrize("file", ["trees", "survey"])
def test_configs(file, file_regression, monkeypatch):
    """From a config to its record and its job's plan."""
    monkeypatch.syspath_prepend(str(HERE))
    cases = yaml.safe_load((HERE / f"{file}.yaml").read_text())
    text = [line for case in cases for line in (f"{case['what']}", *recorded(case), "")]
    file_regression.check("\n".join(text), basename=file)


def test_a_saved_record_holds():
    """A saved config that runs again keeps its decision while its key has the value; else it is decided anew."""
    config = {"model": {"dtype": "auto"}, "optimizer": {"_target_": "torch.optim.AdamW"}}
    first = OmegaConf.to_container(applied(config, {}, []))
    again = OmegaConf.create(first)
    apply(again, [])
    assert OmegaConf.to_container(again) == first
    first["model"]["dtype"] = "bfloat16"
    other = OmegaConf.create(first)
    apply(other, [])
    assert other[NODE].decision.rule == "explicit_dtype"
    nothing = OmegaConf.create(OmegaConf.to_container(applied({}, {}, [])))
    apply(nothing, [])  # a default path that leads nowhere is no error, though the saved config names it
    assert nothing[NODE].decision.rule == "no_model"


FIELDS = {
    "unset": DtypeField("m.dtype", "m.dtype"),
    "auto": DtypeField("m.dtype", "m.dtype", "auto"),
    "added": DtypeField("m.dtype", "+m.dtype", there=False),
    "bf16": DtypeField("m.dtype", "m.dtype", "bfloat16", chosen=True),
    "fp32": DtypeField("m.dtype", "m.dtype", "float32", chosen=True),
    "true": DtypeField("m.as_bf16", "m.as_bf16", True, chosen=True),
    "false": DtypeField("m.as_bf16", "m.as_bf16", False, chosen=True),
    "noted": DtypeField("m.dtype", "m.dtype", chosen=True, note="m.dtype is ???, and"),
    "pointed": DtypeField("m.dtype", "m.dtype", pointed_at="all"),
}
REFUSED = ("no_dtype_key", "m has no key")


def test_the_table(file_regression):
    """The pure table: every model, written or not; and every optimizer with what else there is."""
    models = {
        "nothing": "there is nothing at model",
        **{name: ModelFacts((field,)) for name, field in FIELDS.items()},
        "two": ModelFacts((FIELDS["unset"], FIELDS["bf16"])),
        "refused": ModelFacts((), refusal=REFUSED),
        "quantized": ModelFacts((FIELDS["unset"],), quantized="m.load_in_4bit=True"),
        "loads": ModelFacts((FIELDS["unset"],), loads_checkpoint_dtype=True),
        "kernels": ModelFacts((FIELDS["unset"],), fp16_kernels="m.attn=flash_attention_2"),
    }
    optimizers = {
        "nothing": "there is nothing at optimizer",
        "torch's": OptimizerFacts("torch.optim.AdamW", True),
        "other": OptimizerFacts("lion.Lion", False),
    }
    more = {
        "": {},
        "peft": {"peft": "peft.r=8"},
        "peft found": {"peft": "lora.r=8", "peft_setting": "precision_policy.peft"},
        "peft, mixed": {"peft": "peft.r=8", "compute_dtype": "bfloat16"},
        "warns": {"write": False},
        "mixed, advice": {"compute_dtype": "bfloat16", "advice": "; do this", "fp32": 32},
    }
    lines = []
    cases = [
        *product(models, ["torch's"], ["", "warns", "mixed, advice"]),
        *product(["nothing", "unset", "refused"], optimizers, more),
    ]
    for model, optimizer, name in dict.fromkeys(cases):
        decision = asdict(decide(Facts(models[model], optimizers[optimizer], **more[name])))
        lines += [f"{model} | {optimizer} | {name}", *differences(decision, USUAL_DECISION), ""]
    file_regression.check("\n".join(lines))


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
        told = message.warning(optimizer, known, low, usual, None)
        lines += [f"{name}: nearly nothing: {told.nearly_nothing}", told.text, ""]
        assert told.text.startswith(told.short)
        assert told.short.count("\n") == 1

    def warned(what, optimizer, other_way=None, **options):
        todo = plan.Plan("precision_policy=strict", **options)
        text = message.warning(optimizer, optimizers.look_up(optimizer), message.low_precision(optimizer), todo, other_way)
        lines.extend([what, text.text, ""])

    warned(
        "a fix that is not known, a line to paste, a sample", cases["one group"], "optimizer._target_=optimi.AdamW", sample=64
    )
    warned("bf16 is supplied", cases["one group"], compute_dtype="bfloat16", fix="a.dtype=float32 b.dtype=float32")
    warned("a sample of a shard", cases["a shard"], sample=64)
    warned("asked for", named, asked="model.dtype=float32")
    warned("asked for, added, and some arrived", cases["two groups"], asked="model.dtype=float32", added=True)
    warned("asked for, another key", named, asked="m.d=fp32", added=True, elsewhere="trainer.precision=32-true")
    warned("asked for, another key recasts", named, asked="m.d=fp32", elsewhere="trainer.precision=32-true")

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


NAMES = [
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wpe.weight",
    "lm_head.weight",
    "layers.0.self_attn.q_proj.weight",
    "attention.dense.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "h.0.qkv.weight",
    "layers.0.mlp.up.weight",
    "ffn.weight",
    "feed_forward.w1.weight",
    "experts.1.weight",
    "fc2.weight",
    "gate_proj.weight",
    "down_proj.weight",
    "conv.weight",
    "FC.weight",
    "model.norm.weight",
]


def test_sizes():
    sizes = [0, 999, 1000, 1024, 1023_000, 1000 * 2**10, 1000 * 2**20, 1000 * 2**30, 2**50]
    assert [message._bytes(size) for size in sizes] == [
        *("0 B", "999 B", "0.9766 KiB", "1 KiB", "999 KiB", "0.9766 MiB", "0.9766 GiB", "1000 GiB", "1.049e+06 GiB")
    ]


def test_the_plot(tmp_path):
    """A staircase for each kind, told apart without colour."""
    from matplotlib import pyplot

    save_file(
        {
            "embed.weight": tensors((64, 64))[0].detach(),
            "mlp.weight": tensors((64, 64), size=1.0, dtype=torch.float16)[0].detach(),
        },
        tmp_path / "model.safetensors",
    )
    kept = []

    class Pyplot:
        close = staticmethod(kept.append)

        def __getattr__(self, name):
            return getattr(pyplot, name)

    plot(summarize(tmp_path), 1e-5, tmp_path / "plot.png", Pyplot())
    (figure,) = kept
    (axes,) = figure.axes
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tuple(figure.get_size_inches()), figure.get_layout_engine().__class__.__name__) == (
        (7, 4.2),
        "ConstrainedLayoutEngine",
    )
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylim()) == ("log", "learning rate", (-2, 102))
    assert axes.get_ylabel() == "weights that an update of size lr cannot move, %"
    first, second, marked = axes.lines
    assert list(marked.get_xdata()) == [1e-5, 1e-5]
    rates = [2.0**power for power in range(-24, -9)]
    for line, label, style, colour, marker in (
        (first, "embedding (bf16)", "-", "0.0", "o"),
        (second, "feed-forward (fp16)", "--", "0.0", "s"),
    ):
        assert list(line.get_xdata()) == rates
        assert (line.get_label(), line.get_linestyle(), line.get_color(), line.get_marker()) == (label, style, colour, marker)
        assert (line.get_drawstyle(), line.get_linewidth()) == ("steps-post", 2)
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["embedding (bf16)", "feed-forward (fp16)"]
    shares = dict(zip(rates, first.get_ydata(), strict=True))
    assert shares[2.0**-24] > shares[2.0**-17] > shares[2.0**-13]
    assert shares[2.0**-17] == pytest.approx(81.1, abs=0.1)  # as for 1e-5 in the table: the same for all rates up to 2^-16
    pyplot.close(figure)


def test_the_command_line(file_regression, capsys, tmp_path, monkeypatch):
    """What it prints, word for word."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    many, few = tmp_path / "many", tmp_path / "few"
    many.mkdir()
    few.mkdir()
    shapes = [(8 + n, 16) for n in range(len(NAMES) - 1)] + [(64,)]
    sizes = [2.0**-n for n in range(len(NAMES))]
    stored = {n: tensors(s, size=z)[0].detach() for n, s, z in zip(NAMES, shapes, sizes, strict=True)}
    halves = {
        "a.weight": tensors((8, 8), dtype=torch.float16)[0].detach(),
        "b.bias": tensors((8,), dtype=torch.float32)[0].detach(),
    }
    save_file(stored, many / "model-1.safetensors")
    save_file(halves, many / "model-2.safetensors")
    save_file({"b.bias": halves["b.bias"], "steps": torch.ones((), dtype=torch.int64)}, few / "model.safetensors")
    (few / "broken.safetensors").write_bytes(b"no")
    given = [
        [str(many)],
        [str(many), "--lr", "3e-3:3e-5"],
        [str(many / "model-2.safetensors"), "--lr", "2.5e-4"],
        [str(few / "model.safetensors")],
        [str(few)],
        [str(tmp_path / "nothing")],
        [str(many), "--plot", str(tmp_path / "no" / "plot.png")],
        [str(many), "--lr", "0"],
        [str(many), "--lr", "x"],
        [str(many), "--lr", "1:2:3"],
        [str(many), "--lr", "inf"],
        ["--help"],
    ]
    lines = []
    for arguments in given:
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        lines += [f"$ {' '.join(arguments)}", printed.out + printed.err, f"exit {status}", ""]
    file_regression.check("\n".join(lines).replace(str(tmp_path), "TMP"))
