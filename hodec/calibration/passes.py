"""The dense net and its copy on the same batches, both standing at a layer, and what the layer's fit needs of that."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hodec.calibration.im2col import Draw, patches
from hodec.calibration.moments import FitMoments
from hodec.calibration.responses import Responses
from hodec.calibration.sites import Follow, Hook, Site, Stop, Use, back, hooked
from hodec.calibration.walk import Walk
from hodec.formats.layer_types import LAYER_TYPES
from hodec.inference import Batch, run_batches

Index = tuple[Tensor, ...] | None
"""Drawn output positions, along each axis; None for all."""


class _Fixed:
    """Positions that were drawn before, as ``Draw`` gives them."""

    def __init__(self, index: Index) -> None:
        self.index, self.scale = index, 1.0

    def of(self, sizes: Sequence[int]) -> Index:
        if self.index is not None:
            self.scale = (math.prod(sizes) / len(self.index[0])) ** 0.5
        return self.index


def picked(output: Tensor, dims: int, index: Index) -> Tensor:
    """Outputs (N, O, ..) or (.., O) at some positions, as rows (M, O) on the CPU."""
    if not dims:
        return output.reshape(-1, output.shape[-1]).cpu()
    batch = output if output.ndim == dims + 2 else output.unsqueeze(0)
    places: tuple[slice | Tensor, ...] = (slice(None), slice(None), *(index or ()))
    seen = batch.flatten(2) if index is None else batch[places]
    return seen.transpose(1, 2).flatten(0, 1).cpu()


class Pass:
    """One batch on its way through both nets.

    Attributes:
        wanted: site -> for each call so far the positions that were drawn, and what the dense net gives there, (M, O).
        inputs: site -> what the copy is called with there.
        beside: summed site -> what the dense net adds to its output, at the same positions.
        sums: summed site -> in the copy, its output (behind BatchNorm) and what is about to be added to that.
    """

    def __init__(self, passes: "Passes", batch: Batch) -> None:
        self._passes = passes
        self.wanted: dict[Site, list[tuple[Index, Tensor]]] = {}
        self.inputs: dict[Site, list[Tensor]] = {}
        self.beside: dict[Site, Tensor] = {}
        self.sums: dict[Site, tuple[Tensor, Tensor]] = {}
        self.walks = {net: Walk(partial(self._walk, net, batch)) for net in (passes.dense, passes.near)}
        self.follows = {net: Follow(partial(self._at_sum, net)) for net in self.walks}

    def _walk(self, net: nn.Module, batch: Batch) -> None:
        with ExitStack() as stack:
            if self._passes.sums:
                stack.enter_context(self.follows[net])
            run_batches(net, [batch], count=self._passes.count)

    def to(self, stop: Stop) -> None:
        """Go on until both nets stand there, or are through."""
        self._passes.now, self._passes.target = self, stop
        for walk in self.walks.values():
            walk.on()

    @property
    def held(self) -> int:
        """Bytes of what the copy's layers are called with here."""
        return sum(x.nbytes for calls in self.inputs.values() for x in calls)

    def leave(self) -> None:
        """Do not go on."""
        for walk in self.walks.values():
            walk.leave()

    # -- on the way --------------------------------------------------------------------------------------------

    def given(self, site: Site, output: Tensor) -> None:
        """The dense layer gave this."""
        index = None
        if site.dims:
            index = self._passes.draw.of((output if output.ndim == site.dims + 2 else output.unsqueeze(0)).shape[2:])
        calls = self.wanted.setdefault(site, [])
        calls.append((index, picked(output, site.dims, index)))
        if site.summed:
            self.follows[self._passes.dense].follow(output, site)
        elif len(calls) == site.calls:
            self._stop(site, self._passes.dense)

    def met(self, site: Site, x: Tensor) -> None:
        """The copy's layer is about to be called with this."""
        calls = self.inputs.setdefault(site, [])
        calls.append(x)
        if not site.summed and len(calls) == site.calls:
            self._stop(site, self._passes.near)

    def _at_sum(self, net: nn.Module, use: Use) -> None:
        if not use.is_sum:
            return
        for site, place in use.places.items():
            own, other = use.args[place], use.args[1 - place]
            if net is self._passes.near:
                self.sums[site] = (own, other)
            elif self.wanted.get(site):
                self.beside[site] = picked(other, site.dims, self.wanted[site][-1][0])
        self._stop(next(iter(use.places)), net)

    def _stop(self, site: Site, net: nn.Module) -> None:
        if site in self._passes.target.sites:
            self.walks[net].stop()

    # -- for a fit ---------------------------------------------------------------------------------------------

    def add_to(self, moments: FitMoments, responses: Responses, site: Site) -> None:
        """Add this batch to what is known for the fit of a site, once."""
        scale = responses.scale
        for (index, rows), x in zip(self.wanted.pop(site, ()), self.inputs.get(site, ()), strict=False):
            in_dense: Tensor | float = self.beside.pop(site, 0.0)
            seen = site in self.sums and isinstance(in_dense, Tensor)
            in_near = picked(self.sums[site][1], site.dims, index) if seen else in_dense
            wanted = rows + (in_dense - in_near) * back(scale) if seen else rows
            z = rows * scale + responses.shift + in_dense if site.rectified else rows
            at, fixed = 0, _Fixed(index)
            for patch in patches(site.plain, LAYER_TYPES[site.layer.layer_type], x, cast(Draw, fixed)):
                part = slice(at, at + len(patch))
                at += len(patch)
                patch = patch / fixed.scale
                moments.add(patch, wanted[part])
                if site.rectified:
                    near = in_near[part] if isinstance(in_near, Tensor) else in_near
                    responses.add(patch, wanted[part], z[part], near)

    def renew(self, site: Site) -> None:
        """Put what the fitted layer gives in place of what it gave before the sum."""
        calls = self.inputs.pop(site, [])
        if site in self.sums:
            own, _ = self.sums.pop(site)
            own.copy_(site.again(calls[-1]))


class Passes:
    """Both nets with what their layers are to note, as long as the context lasts; passes still open are left then.

    Args:
        stops: where passes stand still; sites of no stop are passed by.
        count: inputs that the net takes, see ``run_batches``.
        positions: most output positions of a convolution looked at per image and call; None for all.

    Attributes:
        now, target: the pass that goes on, and to where.
        sums: whether any site is summed.
    """

    now: Pass
    target: Stop

    def __init__(
        self, dense: nn.Module, near: nn.Module, stops: Sequence[Stop], *, count: int | None, positions: int | None
    ) -> None:
        self.dense, self.near, self.count = dense, near, count
        self.draw = Draw(positions, torch.Generator().manual_seed(0))
        self.sites = [site for stop in stops for site in stop.sites]
        self.sums = any(site.summed for site in self.sites)
        self.open: list[Pass] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Passes":
        twins = dict(zip(self.near.modules(), self.dense.modules(), strict=True))
        hooks: list[Hook] = [(site.dense, partial(self._given, site)) for site in self.sites]
        for site in self.sites:
            handle = site.near.register_forward_pre_hook(partial(self._met, site), with_kwargs=True)
            self._stack.callback(handle.remove)
            if site.summed:
                hooks.append((site.near, partial(self._came_out, site)))
                if site.norm is not None:
                    hooks += [(twins[site.norm], self._normed), (site.norm, self._normed)]
        self._stack.enter_context(hooked(hooks))
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.open:
            one.leave()
        self._stack.close()

    def start(self, batch: Batch) -> Pass:
        """A pass of one batch, at the beginning."""
        self.open.append(Pass(self, batch))
        return self.open[-1]

    def done(self, site: Site) -> None:
        """Note nothing more of a site."""
        self.sites.remove(site)

    def _given(self, site: Site, _m: nn.Module, _a: object, output: Tensor) -> None:
        if site in self.sites:
            self.now.given(site, output)

    def _met(self, site: Site, _m: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        if site in self.sites:
            self.now.met(site, args[0] if args else next(iter(kwargs.values())))

    def _came_out(self, site: Site, _m: nn.Module, _a: object, output: Tensor) -> None:
        if site in self.sites:
            self.now.follows[self.near].follow(output, site)

    def _normed(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        for follow in self.now.follows.values():
            site = follow.key_of(args[0])
            if site is not None:
                follow.follow(output, site)
