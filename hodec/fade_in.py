"""FadeIn: a factorized net goes on as the dense one, whose difference from it fades out while it is trained."""

from typing import cast

import torch
from torch import Tensor, nn

from hodec.errors import ConfigError
from hodec.inference import InertHook, modules_by_name
from hodec.layers.base import FactorizedLayer
from hodec.layers.plain import plain_layer


class FadeIn:
    """Lets each factorized layer apply Z + s (W - Z), so that training begins with the outputs of the dense net:

        fade = hodec.FadeIn(small, dense)
        for step, (x, y) in enumerate(loader):
            fade.step(max(0.0, 1 - step / 1000))
            ...
        fade.remove()

    Z is the weight of the factors, which are trained. What they lack of the dense weight W is kept as it is now: W - Z
    is in no file and no list of parameters, and takes as much memory as W. At s = 0 the net is the factorized one, bit
    for bit. Other hooks on a layer see what it gives with its share of W - Z.

    It only hooks onto the layers of ``small``; copies of it fade too, files of it hold the factorized net. A second one
    takes the place of the first, and begins with the outputs of the dense net again. BatchNorm's statistics are left
    alone: those of the dense net are right for s = 1. Weights that a parent reads for itself, inside attention and
    recurrent layers, are factorized at once.

    Args:
        small: the factorized net, as it was converted.
        dense: the net that it was converted from; only its weights are read.

    Attributes:
        layers: names of the layers that fade.
        share: s.

    Raises:
        ConfigError: ``small`` has no factorized layer whose name the dense net has, or its size is another there.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> small, x = hodec.convert(net, plan), torch.randn(8, 64)
        >>> fade = hodec.FadeIn(small, net)
        >>> torch.allclose(small(x), net(x), atol=1e-5)
        True
        >>> fade.remove()
        >>> torch.allclose(small(x), net(x), atol=1e-5)
        False
    """

    def __init__(self, small: nn.Module, dense: nn.Module) -> None:
        theirs, self.share = modules_by_name(dense), 1.0
        found = {name: one for name, one in modules_by_name(small).items() if isinstance(one, FactorizedLayer)}
        self._residuals = {name: _residual(name, one, theirs[name]) for name, one in found.items() if name in theirs}
        self.layers = list(self._residuals)
        if not self.layers:
            raise ConfigError(
                "there is no factorized layer whose name the dense net has: give the net it was made from"
            )
        for name in self.layers:
            hooks = found[name]._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Add)]:
                del hooks[key]
        # before other hooks, which are to see the sum
        self._hooks = [found[name].register_forward_hook(_Add(self, name), prepend=True) for name in self.layers]

    def step(self, share: float) -> None:
        """Set s, from 1 (dense) to 0 (factorized).

        Raises:
            ConfigError: another number.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"share: {share} given; allowed: 0 (the factorized net) to 1 (the dense one)")
        self.share = float(share)

    def remove(self) -> None:
        """Take the hooks off: what stays is the factorized net."""
        self.share = 0.0  # in copies of the net too, which have the hooks still
        for hook in self._hooks:
            hook.remove()


class _Add:
    """The hook of a layer: adds its share of W - Z."""

    def __init__(self, fade: FadeIn, name: str) -> None:
        self.fade, self.name = fade, name

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.fade.share:
            return output
        like = next(layer.parameters())
        residual = self.fade._residuals[self.name].to(like.device, like.dtype)
        return output + self.fade.share * cast(Tensor, residual(*args))

    def __deepcopy__(self, memo: object) -> "_Add":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return (InertHook, ())


@torch.no_grad()
def _residual(name: str, layer: FactorizedLayer, dense: nn.Module) -> nn.Module:
    """The dense layer with the weight W - Z, without a bias, frozen."""
    made, plain = layer.to_dense(), plain_layer(dense)
    weight = None if plain is None else cast(Tensor, plain.layer.weight)
    own = cast(Tensor, made.weight)
    if weight is None or weight.shape != own.shape:
        given = type(dense).__name__ if weight is None else f"a weight of {tuple(weight.shape)}"
        raise ConfigError(f"layer {name}: {given} in the dense net, {tuple(own.shape)} in the factorized one")
    made.weight = nn.Parameter(weight.to(own) - own)
    if hasattr(made, "bias"):
        made.register_parameter("bias", None)
    return made.requires_grad_(False)
