"""Errors a user can cause."""

import inspect

from hodec import errors
from hodec.errors import HodecError, near_matches


def test_every_error_is_a_hodec_error_and_says_what_it_is_for():
    kinds = [
        layer_type
        for _, layer_type in inspect.getmembers(errors, inspect.isclass)
        if layer_type.__module__ == errors.__name__
    ]
    assert len(kinds) > 5
    assert all(issubclass(layer_type, HodecError) and layer_type.__doc__ for layer_type in kinds)


def test_near_matches():
    known = ["layer1.0.conv1", "layer1.0.conv2", "fc"]
    assert near_matches("layer1.0.conv3", known) == " Did you mean: layer1.0.conv2, layer1.0.conv1?"
    assert near_matches("layer1.0.conv3", tuple(known), count=1) == " Did you mean: layer1.0.conv2?"
    assert near_matches("zzz", known) == ""
    assert near_matches("x", []) == ""
