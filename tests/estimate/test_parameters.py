"""Parameters as the numbers see them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from precision_policy.estimate import parameters

pytestmark = pytest.mark.once


@given(sizes=st.lists(st.integers(0, 12), max_size=8), step=st.integers(1, 9))
def test_a_sample_over_tensors_is_one_over_all_of_them(sizes, step):
    whole = torch.arange(sum(sizes))
    sample = parameters.EvenSample(step)
    views = [view for part in whole.split(sizes) for view in sample.of(part)]
    assert torch.equal(torch.cat([*views, whole[:0]]), whole[::step])
