"""Errors a user can cause."""

import inspect

import pytest

from hodec import errors
from hodec.errors import HodecError, Use, near_matches


def test_every_error_is_a_hodec_error_and_says_what_it_is_for():
    members = inspect.getmembers(errors, inspect.isclass)
    kinds = [kind for _, kind in members if kind.__module__ == errors.__name__ and kind is not errors.Use]
    assert len(kinds) > 5
    assert all(issubclass(kind, HodecError) and kind.__doc__ for kind in kinds)


def test_near_matches():
    known = ["layer1.0.conv1", "layer1.0.conv2", "fc"]
    assert near_matches("layer1.0.conv3", known) == " Did you mean: layer1.0.conv2, layer1.0.conv1?"
    assert near_matches("layer1.0.conv3", tuple(known), count=1) == " Did you mean: layer1.0.conv2?"
    assert near_matches("zzz", known) == ""
    assert near_matches("x", []) == ""


@pytest.mark.parametrize("uses", [{}, {"target": Use("ranks.macs", 0.4)}])
def test_a_name_in_a_file_neither_ends_the_line_nor_steers_the_terminal(uses):
    error = HodecError("a\nb, \x1b[2Jc and d\r:\n  one\n  two\x9b", **uses)
    assert str(error) == "a\\nb, \\x1b[2Jc and d\\r:\n  one\n  two\\x9b"
