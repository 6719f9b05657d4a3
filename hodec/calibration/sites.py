"""The planned layers of a net in the order they are met, with what comes behind each: BatchNorm, a sum, a ReLU.

All of it is read off one forward pass: hooks tell what layers give, and a dispatch mode which operations use that.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hodec.calibration.fit import Fit, fittable
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.plain import plain_layer
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
RELUS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
# Channels whose BatchNorm multiplies them by less than this, as a share of the root mean square over channels, carry
# next to nothing: what behind the BatchNorm is to change is asked of them in part only.
LEAST_SCALE = 0.03


@dataclass(eq=False)
class Site:
    """A planned layer in the dense net and in its copy.

    Attributes:
        plain: the layer that it amounts to.
        calls: for one batch.
        norm: the copy's BatchNorm that all of its output goes into, and nobody else's.
        summed: whether what comes out there goes into a sum and nowhere else.
        rectified: whether that, or the sum, goes into a ReLU and nowhere else.
    """

    name: str
    layer: LayerPlan
    dense: nn.Module
    near: nn.Module
    plain: nn.Module
    calls: int = 0
    norm: _BatchNorm | None = None
    summed: bool = False
    rectified: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """Of the copy."""
        return cast(nn.Parameter, self.near._parameters["weight"])

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the copy."""
        return self.near._parameters.get("bias")

    @property
    def has_constant(self) -> bool:
        """Whether its mean output can be moved: by a bias, or by the BatchNorm behind it."""
        return self.bias is not None or self.norm is not None

    @property
    def dims(self) -> int:
        """Spatial axes."""
        return LAYER_TYPES[self.layer.layer_type].dims

    def take(self, fit: Fit) -> None:
        """Give the copy the fitted weight, and the bias or what stands for it in the BatchNorm behind."""
        self.weight.copy_(LAYER_TYPES[self.layer.layer_type].from_oihw(fit.weight))
        if self.norm is not None:
            old = 0 if self.bias is None else self.bias
            cast(Tensor, self.norm.running_mean).sub_(fit.bias.to(self.weight) - old)
        elif self.bias is not None:
            self.bias.copy_(fit.bias)

    def again(self, x: Tensor) -> Tensor:
        """What the copy gives for x, behind the BatchNorm if there is one; no hook is called."""
        y: Tensor = self.near.forward(x)
        return y if self.norm is None else self.norm.forward(y)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (O,) that the copy's BatchNorm applies, float32 on the CPU; 1 and 0 without one."""
        if self.norm is None:
            return torch.ones(self.layer.shape[0]), torch.zeros(self.layer.shape[0])
        scale = (cast(Tensor, self.norm.running_var).float() + self.norm.eps).rsqrt()
        if self.norm.weight is not None:
            scale = scale * self.norm.weight.float()
        shift = -cast(Tensor, self.norm.running_mean).float() * scale
        if self.norm.bias is not None:
            shift = shift + self.norm.bias.float()
        return scale.cpu(), shift.cpu()


def back(scale: Tensor) -> Tensor:
    """By what a wish behind a BatchNorm of this scale is to be multiplied in front of it, (O,): 1 / scale, or less
    where that is large.
    """
    least = (LEAST_SCALE * scale.square().mean().sqrt()).square()
    return scale / (scale.square() + least).clamp_min(1e-30)


@dataclass(eq=False)
class Stop:
    """Where passes stand still: in front of a layer, or at the sum that one or two layers' outputs go into."""

    sites: list[Site] = field(default_factory=list)

    @property
    def repeated(self) -> bool:
        """Whether its layer is met several times in a pass, so that what is behind the first time depends on it."""
        return self.sites[0].calls > 1


def sites_of(dense: nn.Module, near: nn.Module, plan: Plan) -> list[Site]:
    """The layers that can be fitted."""
    found = []
    for name, layer in plan.items():
        if not fittable(layer) or layer.computed_from:
            continue
        module = near.get_submodule(name)
        plain = plain_layer(module)
        if plain is not None:
            found.append(Site(name, layer, dense.get_submodule(name), module, plain.layer))
    return found


# -- what becomes of a layer's output --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """An operation that uses followed tensors.

    Attributes:
        func: the operation.
        places: key of a followed tensor -> its position among the arguments.
        args, kwargs: the arguments.
    """

    func: Any
    places: Mapping[Any, int]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def is_sum(self) -> bool:
        """Whether it adds two tensors of one shape."""
        if self.func not in ADDS or self.kwargs or len(self.args) != 2:
            return False
        one, two = self.args
        return isinstance(two, Tensor) and one is not two and one.shape == two.shape


class Follow(TorchDispatchMode):
    """Calls ``before`` with each operation that uses a followed tensor, and ``behind`` with it and what it gave."""

    def __init__(self, before: Callable[[Use], None], behind: Callable[[Use, Any], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._before, self._behind = before, behind
        self._followed: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def follow(self, tensor: Tensor, key: Any) -> None:
        """Watch a tensor, under this key; the last key counts."""
        self._followed[id(tensor)] = (weakref.ref(tensor), key)

    def key_of(self, tensor: object) -> Any | None:
        """The key of a followed tensor."""
        found = self._followed.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keys = ((self.key_of(leaf), k) for k, leaf in enumerate(tree_leaves((args, kwargs))))
        places = {key: k for key, k in keys if key is not None}
        if not places:
            return func(*args, **kwargs)
        use = Use(func, places, args, kwargs)
        self._before(use)
        out = func(*args, **kwargs)
        if self._behind is not None:
            self._behind(use, out)
        return out


Hook = tuple[nn.Module, Callable[..., object]]
"""A module and what is called behind it with the module, its arguments and its output."""


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """These hooks, as long as the context lasts."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class _Survey:
    """What one pass of the dense net shows.

    Attributes:
        met: site -> when it was first called.
        uses: site and stage of what comes out of it (``output``, ``normed``, ``sum``) -> the operations that use it.
        sums: site -> when what comes out was summed with something.
        normed: BatchNorm of the copy -> the site behind which it was called, each time; None for another input.
    """

    def __init__(self, sites: Sequence[Site], dense: nn.Module, near: nn.Module) -> None:
        self.sites, self.clock = sites, 0
        self.met: dict[Site, int] = {}
        self.uses: dict[tuple[Site | int, str], list[Any]] = {}
        self.sums: dict[Site, int] = {}
        self.normed: dict[_BatchNorm, list[Site | None]] = {}
        twins = zip(dense.modules(), near.modules(), strict=True)
        self.norms = {d: n for d, n in twins if isinstance(n, _BatchNorm) and n.track_running_stats}
        self.mode = Follow(self._used, self._made)

    def __call__(self, run: Callable[[], object]) -> None:
        hooks: list[Hook] = [(site.dense, partial(self._called, site)) for site in self.sites]
        hooks += [(dense, partial(self._normed, near)) for dense, near in self.norms.items()]
        with hooked(hooks), self.mode:
            run()

    def _called(self, site: Site, _m: nn.Module, _a: object, output: Tensor) -> None:
        site.calls += 1
        self.clock += 1
        self.met.setdefault(site, self.clock)
        self.mode.follow(output, (site, "output"))

    def _normed(self, near: _BatchNorm, _m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        site, stage = self.mode.key_of(args[0]) or (None, "")
        found = self.normed.setdefault(near, [])
        found.append(site if stage == "output" else None)
        if found[-1] is not None:
            found[-1].norm = near
            self.mode.follow(output, (site, "normed"))

    def _used(self, use: Use) -> None:
        for key in use.places:
            self.uses.setdefault(key, []).append(use.func if use.is_sum or use.func not in ADDS else None)

    def _made(self, use: Use, out: Any) -> None:
        if not use.is_sum:
            return
        self.clock += 1
        for site, stage in use.places:
            if isinstance(site, Site) and stage == self.end(site):
                self.sums[site] = self.clock
                self.mode.follow(out, (self.clock, "sum"))

    def settle_norm(self, site: Site) -> None:
        """Leave a site no BatchNorm that others use too, or that not all of what comes out of it goes into."""
        uses = len(self.uses.get((site, "output"), ()))
        if site.norm is not None and not (self.normed[site.norm] == [site] * site.calls and uses == site.calls):
            site.norm = None

    def end(self, site: Site) -> str:
        """The last stage in front of a sum."""
        return "output" if site.norm is None else "normed"

    def only(self, of: Site | int, stage: str, allowed: Sequence[Any]) -> bool:
        """Whether nothing but one of these uses it, or the first use is the last of these, in place."""
        uses = self.uses.get((of, stage), [])
        return bool(uses) and uses[0] in allowed and (len(uses) == 1 or uses[0] is allowed[-1])


def survey(
    sites: Sequence[Site], dense: nn.Module, near: nn.Module, run: Callable[[], object], *, sums: bool
) -> list[Stop]:
    """Stops in the order that passes come to them, by one pass of the dense net.

    Args:
        run: the pass.
        sums: whether layers in front of a sum stop there, and not in front of the layer.
    """
    seen = _Survey(sites, dense, near)
    seen(run)
    stops: dict[int, Stop] = {}
    for site, met in seen.met.items():
        seen.settle_norm(site)
        end, once = seen.end(site), site.calls == 1
        site.rectified = once and seen.only(site, end, RELUS)
        site.summed = sums and once and seen.only(site, end, ADDS) and site in seen.sums
        if site.summed:
            site.rectified = seen.only(seen.sums[site], "sum", RELUS)
        stops.setdefault(seen.sums[site] if site.summed else met, Stop()).sites.append(site)
    return [stops[at] for at in sorted(stops)]
