"""How channel counts split."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hodec.errors import PlanError
from hodec.formats.modes import Modes, split_channels

SPLITS = [
    (64, 1, (64,)), (64, 2, (8, 8)), (64, 3, (4, 4, 4)), (64, 4, (2, 2, 4, 4)),
    (128, 2, (8, 16)), (96, 3, (4, 4, 6)), (48, 2, (6, 8)), (512, 3, (8, 8, 8)), (2048, 2, (32, 64)), (1, 2, (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("channels", "count", "expected"), SPLITS)
def test_known_splits(channels: int, count: int, expected: tuple[int, ...]):
    assert split_channels(channels, count) == expected


@pytest.mark.parametrize("prime", [2, 3, 17, 127])
def test_row_12_a_prime_stays_whole_beside_modes_of_one(prime: int):
    assert split_channels(prime, 2) == (1, prime)
    assert split_channels(prime, 3) == (1, 1, prime)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 4))
def test_a_split_multiplies_to_its_channels_in_ascending_order(channels: int, count: int):
    split = split_channels(channels, count)
    assert len(split) == count
    assert math.prod(split) == channels
    assert list(split) == sorted(split)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 600))
def test_no_pair_is_more_even(channels: int):
    small, large = split_channels(channels, 2)
    assert not any(channels % n == 0 for n in range(small + 1, math.isqrt(channels) + 1))
    assert small <= large


@pytest.mark.parametrize(("channels", "count"), [(0, 2), (-4, 2), (8, 0), (8, -1)])
def test_nonsense_is_refused(channels: int, count: int):
    with pytest.raises(PlanError, match="at least 1"):
        split_channels(channels, count)


def test_modes_that_fit_pass():
    Modes((4, 2), (3, 4)).check(8, 12)
    Modes.split(8, 12, 2).check(8, 12)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((4, 4), (3, 4)),  # wrong product in
        ((4, 2), (3, 3)),  # wrong product out
        ((3, 4), (4, 2)),  # sides swapped
        ((8,), (3, 4)),  # not equally long
        ((-2, -4), (3, 4)),
        ((8.0, 1), (3, 4)),
        (("8", 1), (3, 4)),
    ],
)
def test_modes_that_do_not_fit_are_refused_with_those_that_do(inputs: tuple, outputs: tuple):
    with pytest.raises(PlanError, match=r"do not fit 8 -> 12 channels.*Automatic modes: in=.*out="):
        Modes(inputs, outputs).check(8, 12)


def test_no_modes_at_all_are_refused_even_for_one_channel():
    with pytest.raises(PlanError):
        Modes((), ()).check(1, 1)
