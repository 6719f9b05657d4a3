"""Which batch norms are folded, which are not, and that folding changes no output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hodec.fusion.batchnorm import find_folds, scale_and_shift, scaled_last, sources_of
from hodec.fusion.search import observed


def trained(norm: nn.Module) -> nn.Module:
    """With statistics and weights as after training."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    return norm.eval()


class Net(nn.Module):
    """One convolution and one norm; what is done with them is up to ``use``."""

    def __init__(self, use, **norm: object) -> None:
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **norm), use

    def forward(self, x, mask=None):
        return self.use(self, x, mask)


def folds(net: nn.Module, x: torch.Tensor):
    net.eval()
    calls, _ = observed(net, (x,))
    return find_folds(net, (x,), calls)


def plain(net, x, mask):
    return F.relu(net.norm(net.conv(x)))


def branching(net, x, mask):
    return net.norm(net.conv(x)) if x.sum() > -1e9 else x  # cannot be traced


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("use", [plain, branching, lambda n, x, m: n.norm(n.conv(x)) if m is None else n.conv(x)])
def test_a_norm_behind_a_layer_is_found(use):
    found = folds(Net(use), X)
    assert (found.norms, found.kept) == ({"conv": "norm"}, {})


def with_item(use):
    """The same, in a forward pass that cannot be traced."""
    return lambda net, x, mask: use(net, x, mask) if x.sum() > -1e9 else x


def _twice(net, x, mask):
    y = net.conv(x)
    return net.norm(y) + y


def _changed_in_place(net, x, mask):
    return net.norm(net.conv(x).relu_())


def _returned_too(net, x, mask):
    y = net.conv(x)
    return net.norm(y), y


def _view_read(net, x, mask):
    y = net.conv(x)
    return net.norm(y) + y[:, :1]


UNSAFE = {
    "read twice": _twice,
    "changed in between": _changed_in_place,
    "returned too": _returned_too,
    "view read": _view_read,
    "on something else": lambda net, x, mask: net.conv(net.norm(x)),
    "functional": lambda net, x, mask: net.norm(F.conv2d(x, net.conv.weight, padding=1) + net.conv(x)),
    "sum of two": lambda net, x, mask: net.norm(net.conv(x) + x),
}


@pytest.mark.parametrize("wrap", [lambda use: use, with_item], ids=["traced", "watched"])
@pytest.mark.parametrize("name", UNSAFE)
def test_a_norm_that_is_not_the_only_reader_stays(name, wrap):
    found = folds(Net(wrap(UNSAFE[name])), X)
    assert found.norms == {}
    assert found.kept == {"norm": "its input is not one layer's output alone"}


@pytest.mark.parametrize("wrap", [lambda use: use, with_item], ids=["traced", "watched"])
def test_what_is_called_twice_stays(wrap):
    found = folds(Net(wrap(lambda n, x, m: n.norm(n.conv(n.norm(n.conv(x)))))), X)
    assert found.norms == {}
    assert "norm" in found.kept


def test_two_layers_into_one_norm_stay():
    net = Net(with_item(lambda n, x, m: n.norm(n.conv(x)) + n.norm(n.other(x))))
    net.other = nn.Conv2d(4, 4, 1)
    assert folds(net, X).norms == {}


def test_statistics_hooks_and_parametrizations_are_looked_at():
    assert "no running statistics" in folds(Net(plain, track_running_stats=False), X).kept["norm"]
    hooked = Net(plain)
    hooked.conv.register_forward_hook(lambda *_: None)
    assert "hooks" in folds(hooked, X).kept["norm"]
    normed = Net(plain)
    nn.utils.parametrizations.weight_norm(normed.conv)
    assert "norm" in folds(normed, X).kept


def test_linear_layers_of_rows_are_folded_and_those_of_sequences_are_not():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert folds(net, torch.randn(3, 4)).norms == {"0": "1"}
    sequences = folds(net, torch.randn(3, 4, 4))
    assert sequences.norms == {}
    assert "another axis" in sequences.kept["1"]


def test_an_unbatched_convolution_is_not_folded():
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6))  # (4, 8) -> (6, 6), which the norm reads as six rows
    found = folds(net, torch.randn(4, 8))
    assert found.norms == {}


LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), X),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), X),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), X),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), X),
    "transposed groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), X),
    "linear": (nn.Linear(6, 5), nn.BatchNorm1d(5), torch.randn(3, 6)),
    "row": (nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6), X),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folding_changes_no_output(name):
    layer, norm, x = LAYERS[name]
    layer, norm, x = layer.double(), trained(norm.double()), x.double()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    folded = scaled_last(layer, *scale_and_shift(norm))
    torch.testing.assert_close(folded(x), norm(layer(x)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_the_pre_activation_order_is_left_alone():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    found = folds(net, X)
    assert found.norms == {"2": "3"}
    assert set(found.kept) == {"0"}


def test_a_model_that_is_one_layer_has_no_norm():
    assert sources_of(nn.Conv2d(4, 4, 1), [X]) == {}
