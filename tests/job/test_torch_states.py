"""What is known of the step of a class of optimizers: torch's own, one that derives from it, and one from elsewhere."""

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from precision_policy.job.torch_states import KINDS, base_of, kind_of


class Outside(AdamW):
    """It replaces what stands around the step."""

    extra = 1

    def step(self, closure=None):
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)

    def __repr__(self):
        return "Outside"


class Inside(AdamW):
    """It replaces what torch's step calls."""

    def _init_group(self, *arguments):
        return super()._init_group(*arguments)


class Below(Inside):
    """What it derives from does."""


class WithState(SGD):
    """Its state is its own."""

    @property
    def state(self):
        return self.__dict__["state"]


class Groups(SGD):
    param_groups = ()


class Defaults(SGD):
    defaults = ()


class FromElsewhere(Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


def test_what_is_torch_s_own():
    assert base_of(AdamW) is AdamW
    assert kind_of(AdamW) == KINDS["AdamW"]
    assert base_of(Outside) is AdamW
    assert kind_of(Outside) == KINDS["AdamW"]


@pytest.mark.parametrize("kind", [Inside, Below, WithState, Groups, Defaults])
def test_what_is_replaced_inside_steps_all_parameters_at_once(kind):
    known = kind_of(kind)
    assert known.states == KINDS[base_of(kind).__name__].states
    assert (known.elementwise, known.by_tensor, known.is_known) == (False, False, True)


def test_what_is_from_elsewhere_is_not_known():
    assert base_of(FromElsewhere) is None
    known = kind_of(FromElsewhere)
    assert (known.states, known.elementwise, known.by_tensor, known.is_known) == ((), False, False, False)


def test_adafactor_of_transformers_is_served_by_name():
    named = type("Adafactor", (Optimizer,), {"__module__": "transformers.optimization"})
    assert base_of(named) is named
    assert "exp_avg_sq_row" in kind_of(named).states
    other = type("Adafactor", (Optimizer,), {"__module__": "somewhere.optimization"})
    assert base_of(other) is None


def test_which_entries_of_a_state_are_torch_s():
    value = torch.ones(2)
    adam, nadam, unknown = KINDS["Adam"], KINDS["NAdam"], kind_of(FromElsewhere)
    assert adam.makes("exp_avg", value)
    assert nadam.makes("mu_product", value)
    assert unknown.makes("anything", value)
    assert not adam.makes("anything", value)
    for kind in (adam, nadam, unknown):
        assert not kind.makes("step", value)
        assert not kind.makes("exp_avg", 1.0)
        assert not kind.makes("exp_avg", torch.ones(2, dtype=torch.int64))
