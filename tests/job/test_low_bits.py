"""Join and split, over every pattern there is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from precision_policy.job import low_bits

bf16, int16, int32 = torch.bfloat16, torch.int16, torch.int32
EVERY_BF16 = torch.arange(-(2**15), 2**15, dtype=int32).to(int16)
# Both signs, both ends, and what lies on either side of a tie.
LOWS = [0, 1, -1, 2, 255, -256, 0x4000, -0x4000, 0x7FFE, 0x7FFF, -0x8000, -0x7FFF]


def fp32(bits):
    """Numbers by their bits, each taken modulo 2**32."""
    return torch.from_numpy((np.asarray(bits, dtype=np.int64) & 0xFFFFFFFF).astype(np.uint32).view(np.float32).copy())


def bits_of(tensor):
    return tensor.view(int32 if tensor.dtype is torch.float32 else int16)


def split_one_by_one(bits):
    """The definition, in whole numbers: high and low of the bits of a number that is no NaN."""
    low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000
    return (bits - low) >> 16, low


@pytest.mark.parametrize("low", LOWS)
def test_fresh_low_bits_give_every_number_back(low):
    """Split, then join: the same bits, around every bf16 number but those that round to infinity."""
    bits = (EVERY_BF16.long() << 16) + low
    numbers = fp32(bits)
    values, lows = low_bits.parted(numbers)
    high, expected_low = split_one_by_one(bits.numpy() & 0xFFFFFFFF)
    is_nan = numbers.isnan()
    assert torch.equal(bits_of(values)[~is_nan], torch.from_numpy(high.astype(np.uint16).view(np.int16))[~is_nan])
    assert torch.equal(bits_of(lows)[~is_nan], torch.from_numpy(expected_low.astype(np.int16))[~is_nan])
    again = low_bits.joined(values, lows)
    stays = values.isfinite()
    assert stays.sum() > 65000
    assert torch.equal(bits_of(again)[stays], bits_of(numbers)[stays])
    rounded_up = values.isinf()
    assert torch.equal(again[rounded_up], values[rounded_up].float())
    assert values[is_nan].isnan().all()
    assert again[is_nan].isnan().all()


@pytest.mark.parametrize("low", LOWS)
def test_stale_low_bits_stay_within_half_a_step_of_the_weight(low):
    """Whatever bits were left over from another weight: near the weight that is there, zero, infinite and NaN as it is."""
    values = EVERY_BF16.view(bf16)
    lows = torch.full_like(EVERY_BF16, low).view(bf16)
    joined = low_bits.joined(values, lows)
    assert torch.equal(joined.isnan(), values.isnan())
    assert torch.equal(joined[values.isinf()], values[values.isinf()].float())
    finite = values.isfinite()
    distance = (bits_of(joined).long() - (EVERY_BF16.long() << 16))[finite]
    is_zero = values[finite] == 0
    dropped = is_zero & torch.tensor(low < 0)
    assert torch.equal(distance, torch.where(dropped, 0, low))
    assert torch.equal(joined[finite].signbit(), values[finite].signbit())


@pytest.mark.parametrize(
    "pattern", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001, 0x7FC00000, 0x7FFF8000, 0xFFFF8000, 0x7F807FFF]
)
def test_a_nan_stays_one_whatever_its_bits(pattern):
    """0x7fffffff, which CUDA's arithmetic makes, would otherwise become minus zero and look healed."""
    values, lows = low_bits.parted(fp32([pattern, 0x3F800000]))
    assert values[0].isnan()
    assert bits_of(lows)[0] == 0
    assert low_bits.joined(values, lows)[0].isnan()
    assert values[1] == 1


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_numbers_come_back(patterns):
    """The numbers of one tensor do not disturb one another."""
    numbers = fp32(patterns)
    values, lows = low_bits.parted(numbers)
    again = low_bits.joined(values, lows)
    plain = values.isfinite()
    assert torch.equal(bits_of(again)[plain], bits_of(numbers)[plain])
    assert torch.equal(again.isnan(), numbers.isnan())


@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=40))
def test_any_stale_bits_stay_near(pairs):
    """Any weight beside any low bits."""
    values = torch.tensor([pair[0] - 2**15 for pair in pairs], dtype=int16).view(bf16)
    lows = torch.tensor([pair[1] for pair in pairs], dtype=int16)
    joined = low_bits.joined(values, lows.view(bf16))
    assert torch.equal(joined.isnan(), values.isnan())
    assert torch.equal(joined.isinf(), values.isinf())
    finite = values.isfinite()
    distance = bits_of(joined).long() - (bits_of(values).long() << 16)
    assert (distance[finite].abs() <= 2**15).all()


def test_two_infinite_weights_of_opposite_sign_are_seen():
    """With negative low bits they join to large numbers that cancel in a sum."""
    values = torch.tensor([float("inf"), float("-inf"), 1.0], dtype=bf16)
    lows = torch.full((3,), -1, dtype=int16).view(bf16)
    joined = low_bits.joined(values, lows)
    assert joined[0] == float("inf")
    assert joined[1] == float("-inf")
    assert 0.99 < joined[2] < 1


def test_it_rounds_to_nearest():
    """As ``bfloat16()`` does, but for ties, of which that rounds half down."""
    numbers = torch.randn(100_000)
    is_tie = (bits_of(numbers) & 0xFFFF) == 0x8000
    assert torch.equal(low_bits.parted(numbers)[0][~is_tie], numbers.bfloat16()[~is_tie])
    tie = fp32([0x3F808000])
    assert bits_of(low_bits.parted(tie)[0]) == 0x3F81
    assert bits_of(tie.bfloat16()) == 0x3F80


def test_strides_are_the_values_own():
    """Channels last, say."""
    numbers = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    values, lows = low_bits.parted(numbers)
    strided = values.to(memory_format=torch.channels_last)
    joined = low_bits.joined(strided, lows)
    assert joined.stride() == strided.stride()
    assert torch.equal(joined, numbers)
