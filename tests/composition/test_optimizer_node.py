"""Which optimizer a config stands for, in the shapes that projects give it."""

import pytest
from omegaconf import OmegaConf

from precision_policy.composition import optimizer_node


# A node in YAML, the name that is found, and whether it is one of torch.optim.
@pytest.mark.parametrize(
    ("node", "name", "is_torch_optim"),
    [
        ("{_target_: torch.optim.AdamW, _partial_: true}", "torch.optim.AdamW", True),
        ("{_target_: torch.optim.adamw.AdamW}", "torch.optim.adamw.AdamW", True),
        ("{_target_: torch.optim.Optimizer}", "torch.optim.Optimizer", False),
        ("{_target_: torch.optim.lr_scheduler.StepLR}", "torch.optim.lr_scheduler.StepLR", False),
        ("{_target_: hydra.utils.get_class, path: torch.optim.AdamW}", "torch.optim.AdamW", True),
        ("{_target_: hydra.utils.get_method, path: torch.optim.AdamW}", "torch.optim.AdamW", True),
        ("{_target_: hydra.utils.get_class, path: some.Other}", "some.Other", False),
        ("{_target_: hydra_zen.funcs.zen_processing, _zen_target: torch.optim.adamw.AdamW}", "torch.optim.adamw.AdamW", True),
        ("{_target_: hydra_zen.funcs.zen_processing, _zen_target: bnb.optim.AdamW}", "bnb.optim.AdamW", False),
        (
            "{_target_: torch.distributed.optim.ZeroRedundancyOptimizer, optimizer_class: torch.optim.AdamW}",
            "torch.optim.AdamW",
            True,
        ),
        (
            "{_target_: torch.distributed.optim.ZeroRedundancyOptimizer,"
            " optimizer_class: {_target_: hydra.utils.get_class, path: torch.optim.Adam}}",
            "torch.optim.Adam",
            True,
        ),
        ("AdamW", "torch.optim.AdamW", True),
        ("adamw", "torch.optim.AdamW", True),
        ("torch.optim.AdamW", "torch.optim.AdamW", True),
        ("adamw_torch", "torch.optim.AdamW", True),
        ("paged_adamw_8bit", "paged_adamw_8bit", False),
        ("{name: adamw, lr: 1}", "torch.optim.AdamW", True),
        ("{type: SGD}", "torch.optim.SGD", True),
        ("{name: lion, lr: 1}", "lion", False),
        ("[{_target_: torch.optim.AdamW}, {_target_: bnb.optim.AdamW}]", "torch.optim.AdamW", True),
        ("{a: {_target_: some.Other}, b: {_target_: torch.optim.SGD}}", "torch.optim.SGD", True),
        ("{a: {_target_: some.Other}, b: {_target_: torch.optim.lr_scheduler.StepLR}}", "some.Other", False),
        ("{lr: 1.0, betas: [0.9, 0.95]}", "", False),
        ('{name: ""}', "", False),
    ],
)
def test_what_is_found(node, name, is_torch_optim):
    found = optimizer_node.find(OmegaConf.create(f"here: {node}").here)
    assert (found.name, found.is_torch_optim) == (name, is_torch_optim)


@pytest.mark.parametrize("node", ["[1, 2]", "3", "null", '""'])
def test_what_is_no_optimizer(node):
    assert optimizer_node.find(OmegaConf.create(f"here: {node}").here) is None


@pytest.mark.parametrize(
    "config",
    [
        "cls: torch.optim.Adam\noptimizer: {_target_: '${cls}'}",
        "base: {_target_: torch.optim.Adam}\noptimizer: ${base}",
    ],
)
def test_interpolations_are_followed(decide, config):
    assert decide(f"model: {{torch_dtype: auto}}\n{config}").rule == "set"


def test_a_guess_is_said_to_be_one(decide):
    assert 'a guess from the name "adamw"' in decide("model: {torch_dtype: auto}\noptimizer: adamw").reason
