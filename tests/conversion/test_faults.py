"""A layer that cannot be swapped: found among the others, named, and left dense where that is asked for."""

import pytest
import torch
from swaps import X, conv, factorized, planned
from torch import Tensor, nn

from hodec.conversion.dry_run import guilty
from hodec.conversion.swap import convert
from hodec.errors import ConvertError


class Net(nn.Module):
    """Eight convolutions; the parent needs what only torch's own layers have of those in ``private``."""

    def __init__(self, *private: int) -> None:
        super().__init__()
        self.layers, self.private = nn.ModuleList(conv() for _ in range(8)), private

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number in self.private:
                x = x * len(layer._reversed_padding_repeated_twice)
            x = layer(x)
        return x


def test_halving_finds_the_one_that_fails_or_the_pair_that_fails_together():
    names = list("abcdefgh")
    for one in names:
        assert guilty(names, lambda part, one=one: one in part) == [one]
    assert set(guilty(names, lambda part: {"a", "h"} <= set(part))) >= {"a", "h"}
    tried = []
    guilty(names, lambda part: tried.append(part) or "h" in part)
    assert len(tried) == 6  # two a halving


def test_the_error_names_the_guilty_layer_alone():
    net = Net(5)
    with pytest.raises(ConvertError, match=r"^layers\.5: with this layer .* training mode.*exclude=\[layers\.5\]"):
        convert(net, planned(net))


def test_skip_leaves_the_guilty_ones_dense_and_the_plan_says_so(caplog):
    net = Net(2, 5)
    small = convert(net, planned(net), on_error="skip")
    assert set(factorized(small)) == {f"layers.{n}" for n in (0, 1, 3, 4, 6, 7)} == set(small.hodec_plan)
    for name in ("layers.2", "layers.5"):
        assert "could not be converted" in small.hodec_plan.skipped[name]
        torch.testing.assert_close(small.get_submodule(name).weight, net.get_submodule(name).weight)
        assert f"{name} stays dense" in caplog.text
    assert sum(p.numel() for p in small.parameters()) == small.hodec_plan.params_after
    assert small(X).shape == net(X).shape


def test_skip_takes_layers_with_nan_and_uncalled_ones_too():
    class Held(Net):
        def __init__(self) -> None:
            super().__init__()
            self.also = [self.layers[3]]

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.layers[:3], *self.also, *self.layers[4:]):
                x = layer(x)
            return x

    net = Held()
    plan = planned(net)
    net.layers[0].weight.data[0] = torch.nan
    small = convert(net, plan, on_error="skip")
    assert set(plan) - set(small.hodec_plan) == {"layers.0", "layers.3"}


def test_where_nothing_is_left_the_error_is_raised():
    net = nn.Sequential(Net(*range(8)))
    with pytest.raises(ConvertError, match="with this layer factorized"):
        convert(net, planned(net), on_error="skip")


def test_another_word_is_refused():
    net = Net()
    with pytest.raises(ConvertError, match="on_error='ignore' is not one of raise, skip"):
        convert(net, planned(net), on_error="ignore")
