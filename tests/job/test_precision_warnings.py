"""The two functions, and the module that stands in for NeMo Automodel's."""

import logging
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import precision_policy
from precision_policy import precision_warnings as module
from precision_policy.precision_warnings import resolve_storage_dtype, warn_if_torch_adam_with_bf16_params

pytestmark = pytest.mark.once
ADAMW = {"_target_": "torch.optim.AdamW"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    module._WARNED_CONTEXTS.clear()
    module._DTYPE_RESOLVED_CONTEXTS.clear()
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def bf16():
    return torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))


def test_names():
    """Every name that a NeMo user may import."""
    for name in [
        "resolve_storage_dtype",
        "warn_if_torch_adam_with_bf16_params",
        "_get_cfg_attr",
        "_set_cfg_attr",
        "_is_rank_zero",
        "_is_torch_adam_config",
        "_is_torch_adam_optimizer",
        "_is_torch_optim_config",
        "_iter_optimizer_params",
        "_has_trainable_bf16_param",
        "_TORCH_ADAM_TARGETS",
        "_WARNED_CONTEXTS",
        "_DTYPE_RESOLVED_CONTEXTS",
    ]:
        assert hasattr(module, name), name
    assert set(module._TORCH_ADAM_TARGETS) == {
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.adam.Adam",
        "torch.optim.adamw.AdamW",
    }
    assert precision_policy.resolve_storage_dtype is resolve_storage_dtype
    with pytest.raises(AttributeError):
        precision_policy.nothing  # noqa: B018


def read_only(**values):
    cfg = OmegaConf.create(values)
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    return cfg


@pytest.mark.parametrize("make", [dict, SimpleNamespace, lambda **v: OmegaConf.create(v), read_only])
@pytest.mark.parametrize("values", [{}, {"torch_dtype": None}, {"torch_dtype": "auto"}])
def test_sets(make, values):
    cfg = make(**values)
    resolve_storage_dtype(cfg, ADAMW)
    resolve_storage_dtype(cfg, ADAMW)
    assert module._get_cfg_attr(cfg, "torch_dtype") == "float32"


@pytest.mark.parametrize(
    ("model", "optimizer", "is_peft"),
    [
        (None, ADAMW, False),
        ({}, ADAMW, True),
        ({}, {"_target_": "bitsandbytes.optim.AdamW"}, False),
        ({}, {"_target_": "torch.optim.lr_scheduler.StepLR"}, False),
        ({}, {"_target_": "torch.optim.swa_utils.SWALR"}, False),
        ({}, {"_target_": "torch.optim.Optimizer"}, False),
        ({}, {}, False),
        ({}, None, False),
        ({"torch_dtype": "bfloat16"}, ADAMW, False),
        ({"torch_dtype": torch.bfloat16}, ADAMW, False),
        ({"dtype": "bfloat16"}, ADAMW, False),
    ],
)
def test_leaves_alone(model, optimizer, is_peft):
    before = None if model is None else dict(model)
    resolve_storage_dtype(model, optimizer, is_peft)
    assert model == before


@pytest.mark.parametrize("target", ["torch.optim.SGD", "torch.optim.adamw.AdamW", torch.optim.AdamW, torch.optim.Rprop])
def test_every_torch_optimizer(target):
    cfg = {}
    resolve_storage_dtype(cfg, {"_target_": target})
    assert cfg == {"torch_dtype": "float32"}


def test_logs_once_per_context_on_rank_zero(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "precision_policy")
    for context in ("a", "a", "b"):
        resolve_storage_dtype({}, ADAMW, context=context)
    assert len(caplog.records) == 2
    monkeypatch.setenv("RANK", "1")
    cfg = {}
    resolve_storage_dtype(cfg, ADAMW, context="c")
    assert cfg == {"torch_dtype": "float32"}
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": lambda: torch.optim.AdamW([bf16()])},
        {"optimizer": lambda: [torch.optim.SGD([bf16()], 1.0), torch.optim.Adam([bf16()])]},
        {"optimizer": lambda: iter([torch.optim.Adam([bf16()])])},
        {"optimizer_cfg": lambda: ADAMW, "parameters": lambda: iter([bf16()])},
        {"optimizer_cfg": lambda: {"_target_": torch.optim.AdamW}, "optimizer": lambda: torch.optim.SGD([bf16()], 1.0)},
    ],
)
def test_warns(caplog, arguments):
    for _ in range(2):
        warn_if_torch_adam_with_bf16_params(**{key: value() for key, value in arguments.items()})
    assert len(caplog.records) == 1
    assert "float32" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"optimizer": torch.optim.SGD([bf16()], 1.0)},
        {"optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])},
        {"optimizer": torch.optim.AdamW([bf16().requires_grad_(False)])},
        {"optimizer": torch.optim.AdamW([bf16()]), "is_peft": True},
        {"optimizer_cfg": {"_target_": "torch.optim.SGD"}, "parameters": [bf16()]},
        {"optimizer_cfg": ADAMW},
    ],
)
def test_silence(caplog, arguments):
    warn_if_torch_adam_with_bf16_params(**arguments)
    assert not caplog.records


def test_positional(caplog):
    """Both take their arguments by position too, in the documented order."""
    logger = logging.getLogger("mine")
    warn_if_torch_adam_with_bf16_params(torch.optim.AdamW([bf16()]), None, None, False, "there", logger)
    assert caplog.records[0].name == "mine"
    cfg = {}
    resolve_storage_dtype(cfg, ADAMW, False, "there", logger)
    assert cfg == {"torch_dtype": "float32"}


def test_the_readmes_lines_run(capsys):
    """Its Python block, with an optimizer at hand."""
    import re
    from pathlib import Path

    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent.parent / "README.md").read_text(), re.DOTALL)
    exec(code, {"optimizer": torch.optim.AdamW([bf16()], lr=1e-5)})
    assert capsys.readouterr().out == "lr 1e-05: 100.0% of 2 weights cannot move\n"
