"""Numbers as readers see them; ``human`` is tested with the plan's table, too."""

import math

import pytest

from hodec.text_table import accuracy, change, duration, human, number, percent


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (980, "980"), (999.6, "1 k"), (46_415, "46.4 k"), (999_499, "999 k"), (999_999, "1 M"),
        (40_810_000, "40.8 M"), (1.82e9, "1.82 G"), (3.4e12, "3400 G"),
        (-2500, "-2.5 k"), (None, "-"), (math.nan, "NaN"),
    ],
)  # fmt: skip
def test_counts_have_three_digits_and_a_prefix(value, shown):
    assert human(value) == shown


def test_bytes_have_their_unit():
    assert [human(value, "B") for value in (12, 1_856_616, None)] == ["12 B", "1.86 MB", "-"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.96934, "96.93 %"), (1.0, "100.00 %"), (0, "0.00 %"), (None, "-"), (math.inf, "inf")],
)
def test_accuracy_has_two_decimals(value, shown):
    assert accuracy(value) == shown


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.803, "-80.3 %"), (-0.1, "+10.0 %"), (0.0, "0.0 %"), (0.0001, "0.0 %"), (-0.0001, "0.0 %"), (None, "-")],
)
def test_a_cut_reads_as_the_change_it_makes(fraction, shown):
    assert change(fraction) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.625, "62.5 %"), (0.0102, "1.02 %"), (0.004, "0.400 %"), (3.5, "350 %"), (0.0, "0.00 %")]
)
def test_relative_errors_have_three_digits(value, shown):
    assert percent(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(8.44, "8.4 s"), (59.97, "1 min 0 s"), (725, "12 min 5 s"), (3599.6, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_durations_carry_over(seconds, shown):
    assert duration(seconds) == shown


def test_numbers_have_a_format_and_a_unit():
    assert number(-0.003, "+.2f", scale=100) == "-0.30"
    assert number(-0.00001, "+.2f", scale=100) == "0.00"
    assert number(464_154, ",.0f") == "464,154"
    assert number(3.4159, unit=" ms") == "3.42 ms"
