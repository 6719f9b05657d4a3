"""Numbers as readers see them."""

import math

import pytest

from hodec.experiment.report import units


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (980, "980"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (46_415, "46.4 k"),
        (464_154, "464 k"),
        (999_499, "999 k"),
        (999_999, "1.00 M"),
        (40_810_000, "40.8 M"),
        (1.82e9, "1.82 G"),
        (-2500, "-2.50 k"),
        (None, "-"),
        (math.nan, "NaN"),
    ],
)
def test_counts_have_three_digits_and_a_prefix(value, shown):
    assert units.count(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.96934, "96.93 %"), (1.0, "100.00 %"), (0, "0.00 %"), (None, "-"), (math.inf, "inf")],
)
def test_accuracy_has_two_decimals(value, shown):
    assert units.accuracy(value) == shown


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.803, "-80.3 %"), (-0.1, "+10.0 %"), (0.0, "0.0 %"), (0.0001, "0.0 %"), (-0.0001, "0.0 %"), (None, "-")],
)
def test_a_cut_reads_as_the_change_it_makes(fraction, shown):
    assert units.change(fraction) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.625, "62.5 %"), (0.0102, "1.02 %"), (0.004, "0.400 %"), (3.5, "350 %"), (0.0, "0 %")]
)
def test_relative_errors_have_three_digits(value, shown):
    assert units.share(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(8.44, "8.4 s"), (59.97, "1 min 0 s"), (725, "12 min 5 s"), (3599.6, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_durations_carry_over(seconds, shown):
    assert units.duration(seconds) == shown


def test_points_and_sizes():
    assert units.points(-0.003) == "-0.30"
    assert units.points(-0.00001) == "0.00"
    assert units.points(0.012) == "+1.20"
    assert units.size(1_856_616) == "1.86 MB"
    assert units.size(None) == "-"
    assert units.exact(464_154) == "464,154"
    assert units.integers((64, 32, 3, 3), " x ") == "64 x 32 x 3 x 3"
    assert units.integers(()) == "-"
