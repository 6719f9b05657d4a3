"""Numbers as people read them."""

import pytest

from hodec.text_table import human


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (1234, "1.23 k"), (36_864, "36.9 k"), (999_400, "999 k"),
        (1_234_567, "1.23 M"), (57_802_752, "57.8 M"), (1.8e9, "1.8 G"), (-1500, "-1.5 k"),
    ],
)  # fmt: skip
def test_human(number: float, text: str):
    assert human(number) == text


@pytest.mark.parametrize("number", [999_600, 999_999_999])
def test_no_number_is_written_with_an_exponent(number: float):
    assert "e" not in human(number)
