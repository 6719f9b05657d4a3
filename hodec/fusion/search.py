"""fuse: a compressed model as plain layers, each as the variant that runs fastest on this device."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hodec.compare import distance, tensors_in
from hodec.cost.timing import device_name, medians_ms
from hodec.errors import ConvertError, near_matches
from hodec.formats.ops import CHAIN_RATE
from hodec.fusion.batchnorm import Call, Folds, find_folds, foldable, is_norm, scale_and_shift, scaled_last
from hodec.fusion.report import FuseReport, LayerChoice
from hodec.fusion.variants import CHAIN, DENSE, Variant, variants_of
from hodec.inference import inference, laid_out, settled_input, uncompiled
from hodec.inputs import Inputs, ModelInput, as_input
from hodec.layers.base import FactorizedLayer, factor_parameters, same_random_state
from hodec.layers.inner import multiply_out
from hodec.layers.plain import HOOKS, copied

log = logging.getLogger(__name__)

TARGETS = ("latency", "macs")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# A variant must be faster than dense by this ratio: the widest spread of a row of benchmarks/fused.py.
MARGIN = 0.03

# Seconds of measuring: the variants of one layer, and the whole net.
LAYER_SECONDS, NET_SECONDS = 0.5, 3.0

Choose = Callable[[str, Mapping[str, Variant]], LayerChoice]


def fuse(
    model: nn.Module,
    *,
    example_input: Inputs,
    target: str = "latency",
    fold_batchnorm: bool = True,
    memory_format: str = "auto",
) -> nn.Module:
    """A copy of a model for inference, made of torch's own layers; the given model is left as it was.

    Each factorized layer becomes the fastest of its variants: its ops as they are, neighbouring ops multiplied
    into one, the chain of contractions, or the dense layer. Batch norms are folded into the layer before them, and
    the memory format is chosen for the whole net. Weights inside recurrent modules, attention and experts become dense
    where they are rebuilt; modules that run their factors keep hodec's class around plain layers. The result runs on
    the device of ``model``, in evaluation mode. ``result.fuse_report`` says what was chosen and why; print it.

    The parameters of the result take no gradients: train the given model, and fuse it again. The choice is for the
    batch size of ``example_input``: what is fastest for one image may not be for many.

    Args:
        model: what ``convert`` or ``load`` made; any other net too, whose batch norms are folded.
        example_input: as the model takes, batch first, on its device; see ``hodec.make_plan``.
        target: ``latency`` measures every variant on this device; ``macs`` measures nothing and counts multiply-adds.
        fold_batchnorm: False leaves the norms alone.
        memory_format: ``channels_last``, ``contiguous``, or ``auto``: by measuring (``contiguous`` for ``macs``).

    Raises:
        ConvertError: an unknown target or format, or a net that does not run or gives other outputs when fused.
        PlanError: an example input that is no tensor with a batch axis.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> fast = hodec.fuse(hodec.convert(net, plan), example_input=torch.zeros(1, 64), target="macs")
        >>> [layer for layer in fast.modules() if isinstance(layer, nn.Linear)][:2]
        [Linear(in_features=64, out_features=4, bias=False), Linear(in_features=4, out_features=64, bias=True)]
    """
    _check("target", target, TARGETS)
    _check("memory_format", memory_format, ("auto", *FORMATS))
    inputs = settled_input(uncompiled(model), example_input)
    with same_random_state(inputs.tensors):
        work = _Work.of(uncompiled(model), inputs, fold=fold_batchnorm)
        if target == "macs":
            layout = "contiguous" if memory_format == "auto" else memory_format
            return work.finish(target, layout, work.choose(_fewest_macs), {})
        return _fastest(work, memory_format)


def _check(what: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        hint = near_matches(given, tuple(allowed))
        raise ConvertError(f"fuse: {what}={given!r} is not one of {', '.join(allowed)}.{hint}")


@dataclass(frozen=True)
class _Work:
    """A model about to be fused.

    Attributes:
        base: a copy in evaluation mode.
        expected: its outputs.
        calls: what its layers and norms are called with.
        folds: which norms go into which layers.
    """

    base: nn.Module
    inputs: ModelInput
    expected: list[Tensor]
    calls: Mapping[str, Sequence[Call]]
    folds: Folds

    @classmethod
    def of(cls, model: nn.Module, inputs: ModelInput, *, fold: bool) -> "_Work":
        base = copied(model).eval()
        try:
            calls, expected = observed(base, inputs)
        except Exception as error:  # whatever a forward pass raises
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs.tensors)
            raise ConvertError(
                f"the model does not run on example_input of shape {shapes}: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}; give inputs as the model takes, on its device"
            ) from error
        folds = find_folds(base, inputs, calls) if fold else Folds({}, {})
        work = cls(base, inputs, expected, calls, folds)
        if folds.norms and not work.close(work.build(work.choose(_fewest_macs))):
            # e.g. a net that reads its norms' statistics itself: better slow than wrong
            log.warning("with batch norms folded the net gives other outputs: they are left as they are")
            kept = dict.fromkeys(folds.norms.values(), "with norms folded the net gives other outputs")
            work = cls(base, inputs, expected, calls, Folds({}, {**folds.kept, **kept}))
        return work

    @property
    def device(self) -> torch.device:
        return self.inputs.tensors[0].device

    def factorized(self) -> dict[str, FactorizedLayer]:
        """Name -> layer, of those that run."""
        found = self.base.named_modules()
        return {name: m for name, m in found if isinstance(m, FactorizedLayer) and self.calls.get(name)}

    def norm(self, name: str) -> nn.Module | None:
        return self.base.get_submodule(self.folds.norms[name]) if name in self.folds.norms else None

    def variants(self, name: str, layer: FactorizedLayer) -> dict[str, Variant]:
        return variants_of(layer, self.calls[name], self.norm(name))

    def choose(self, how: Choose) -> dict[str, LayerChoice]:
        """One choice a factorized layer."""
        return {name: how(name, self.variants(name, layer)) for name, layer in self.factorized().items()}

    def build(self, choices: Mapping[str, LayerChoice], layout: str = "contiguous") -> nn.Module:
        """The net with these variants and with norms folded."""
        net = copied(self.base)
        for name, layer in self.factorized().items():
            made = self.variants(name, layer)[choices[name].variant].build()
            for hooks in HOOKS:
                getattr(made, hooks).update(getattr(layer, hooks))
            net = replaced(net, name, made)
        for layers in _sharing(self.factorized()):
            _share_equal([net.get_submodule(name) for name in layers])
        for name, norm in self.folds.norms.items():
            if name not in choices:
                folded = scaled_last(net.get_submodule(name), *scale_and_shift(net.get_submodule(norm)))
                net = replaced(net, name, folded)
            net = replaced(net, norm, nn.Identity())
        return laid_out(multiply_out(net, rebuilt_only=True).eval().requires_grad_(False), FORMATS[layout])

    def difference(self, net: nn.Module) -> float:
        """Relative distance of the net's outputs from the expected ones; infinite where their shapes differ."""
        try:
            with inference(net):
                made = self.inputs.run(net)
        except Exception as error:
            log.debug("the fused net does not run", exc_info=True)
            raise ConvertError(
                f"the fused net does not run: {type(error).__name__}: {error}. A parent reads attributes of a "
                "factorized layer that plain layers lack: call the layer only, or leave it dense in the plan"
            ) from error
        return distance(made, self.expected)

    def close(self, net: nn.Module) -> bool:
        """Whether a net does what the given one does; one that does not run is not close."""
        try:
            return self.difference(net) <= self.tolerance
        except ConvertError:
            return False

    @property
    def tolerance(self) -> float:
        """How far outputs may be from the expected ones, relative to their norm, by the widest rounding among them."""
        by_dtype = {torch.float64: 1e-8, torch.float32: 1e-2 if self.device.type == "cuda" else 1e-3}  # TF32
        return max((by_dtype.get(t.dtype, 5e-2) for t in self.expected if t.is_floating_point()), default=0.0)

    def finish(
        self, target: str, layout: str, choices: dict[str, LayerChoice], net_ms: Mapping[str, float]
    ) -> nn.Module:
        """The net, checked, with its report."""
        net = self.build(choices, layout)
        error = self.difference(net)
        if not error <= self.tolerance:
            raise ConvertError(
                f"the fused net's outputs differ from the given net's by {error:.2g} of their norm (allowed "
                f"{self.tolerance:g}); its forward pass may depend on more than its input, or hold NaN"
            )
        folded = {norm: name for name, norm in self.folds.norms.items()}
        shapes = tuple(tuple(x.shape) for x in self.inputs.tensors)
        net.fuse_report = FuseReport(  # type: ignore[assignment]
            target, device_name(self.device), shapes, choices, folded, dict(self.folds.kept), layout, net_ms, error
        )
        return net


# -- what is chosen -------------------------------------------------------------------------------------------------


def _fastest(work: _Work, memory_format: str) -> nn.Module:
    """Memory format by the whole net, then each layer by itself, then the whole net against one of dense layers."""
    first = work.choose(_fewest_macs)
    work.difference(work.build(first))  # a net that does not run is named before it is measured
    layout, net_ms = _layout(work, first, memory_format)
    measured: dict[Hashable, dict[str, float]] = {}

    def pick(name: str, variants: Mapping[str, Variant]) -> LayerChoice:
        key = _signature(work, name)
        if key not in measured:  # layers of one shape are measured once
            measured[key] = _measure(work, name, variants, layout)
        return _quickest(work, name, variants, measured[key])

    choices = work.choose(pick)
    if any(choice.variant != DENSE and DENSE in choice.macs for choice in choices.values()):
        choices, times = _faster_net(work, choices, layout)
        net_ms |= times
    return work.finish("latency", layout, choices, net_ms)


def _layout(work: _Work, choices: Mapping[str, LayerChoice], asked: str) -> tuple[str, dict[str, float]]:
    if asked != "auto":
        return asked, {}
    if not any(p.ndim == 4 for p in work.base.parameters()) and not work.factorized():
        return "contiguous", {}
    nets = {name: work.build(choices, name) for name in FORMATS}
    times = _times(work, nets)
    return min(times, key=lambda name: times[name]), times


def _faster_net(
    work: _Work, choices: dict[str, LayerChoice], layout: str
) -> tuple[dict[str, LayerChoice], dict[str, float]]:
    """These choices, or dense ones where the whole net is faster so."""
    dense = {
        name: LayerChoice(DENSE, "the whole net is faster dense", c.macs, c.ms, c.norm) if DENSE in c.macs else c
        for name, c in choices.items()
    }
    times = _times(work, {"fused": work.build(choices, layout), "dense": work.build(dense, layout)})
    if times["fused"] <= times["dense"]:
        return choices, times
    log.warning("the whole net is faster with dense layers: %.3g ms, else %.3g", times["dense"], times["fused"])
    return dense, {"fused": times["dense"], "dense": times["dense"]}


def _times(work: _Work, nets: Mapping[str, nn.Module]) -> dict[str, float]:
    with torch.inference_mode():
        works = {name: lambda net=net: work.inputs.run(net) for name, net in nets.items()}
        return medians_ms(works, device=work.device, seconds=NET_SECONDS)


def _signature(work: _Work, name: str) -> Hashable:
    layer = cast(FactorizedLayer, work.base.get_submodule(name))
    return (type(layer), repr(layer), layer.modes, tuple(work.calls[name]), name in work.folds.norms)


def _measure(work: _Work, name: str, variants: Mapping[str, Variant], layout: str) -> dict[str, float]:
    """Median milliseconds of each variant of a layer, over all its calls."""
    layer = work.base.get_submodule(name)
    kind = next(layer.parameters()).dtype
    if len(variants) == 1:
        return {}
    given = [torch.randn(call.given, device=work.device, dtype=kind) for call in work.calls[name]]
    given = [x.contiguous(memory_format=FORMATS[layout]) if x.ndim == 4 else x for x in given]
    modules = {variant: laid_out(one.build(), FORMATS[layout]) for variant, one in variants.items()}
    with torch.inference_mode():
        works = {variant: lambda m=module: [m(x) for x in given] for variant, module in modules.items()}
        return medians_ms(works, device=work.device, seconds=LAYER_SECONDS)


def _quickest(work: _Work, name: str, variants: Mapping[str, Variant], ms: Mapping[str, float]) -> LayerChoice:
    macs = {variant: one.macs for variant, one in variants.items()}
    norm = work.folds.norms.get(name, "")
    if not ms:
        return _only(variants, macs, norm)
    best = min(ms, key=lambda variant: ms[variant])
    if best == DENSE or ms[best] > (1 - MARGIN) * ms[DENSE]:
        near = min((variant for variant in ms if variant != DENSE), key=lambda variant: ms[variant])
        return LayerChoice(DENSE, f"no variant is faster: {near} takes {ms[near]:.3g} ms", macs, ms, norm)
    others = ", ".join(f"{variant} {time:.3g}" for variant, time in ms.items() if variant not in (best, DENSE))
    return LayerChoice(best, "fastest" + (f"; {others} ms" if others else ""), macs, ms, norm)


def _only(variants: Mapping[str, Variant], macs: Mapping[str, int], norm: str) -> LayerChoice:
    variant = next(iter(variants))
    reason = "no other variant saves multiply-adds" if variant == DENSE else "kept for its memory"
    return LayerChoice(variant, reason, macs, {}, norm)


def _fewest_macs(name: str, variants: Mapping[str, Variant]) -> LayerChoice:
    """The variant of fewest multiply-adds; the chain, whose steps are small, must save more than that."""
    macs = {variant: one.macs for variant, one in variants.items()}
    if len(variants) == 1:
        return _only(variants, macs, "")
    cost = {variant: n / CHAIN_RATE if variant == CHAIN else n for variant, n in macs.items()}
    best = min(cost, key=lambda variant: cost[variant])
    return LayerChoice(best, "fewest multiply-adds", macs, {}, "")


# -- nets -----------------------------------------------------------------------------------------------------------


def observed(model: nn.Module, inputs: Inputs) -> tuple[dict[str, list[Call]], list[Tensor]]:
    """The calls of every layer and norm by name, and the tensors that the model puts out."""
    calls: dict[str, list[Call]] = {}

    def remember(name: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        calls.setdefault(name, []).append(Call(tuple(given.shape), tuple(output.shape)))

    with inference(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, FactorizedLayer) or is_norm(module) or foldable(module):
                hook = module.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: remember(name, args, kwargs, output), with_kwargs=True
                )
                hooks.callback(hook.remove)
        return calls, tensors_in(as_input(inputs, model).run(model))


def _sharing(layers: Mapping[str, FactorizedLayer]) -> list[list[str]]:
    """The names of the layers that have the same factors, set by set."""
    sets: dict[frozenset[nn.Parameter], list[str]] = {}
    for name, layer in layers.items():
        sets.setdefault(frozenset(factor_parameters(layer)), []).append(name)
    return [names for names in sets.values() if len(names) > 1]


def _share_equal(modules: Sequence[nn.Module]) -> None:
    """Let parameters of these modules be one where they are equal: both ways to run a shared factor are there once."""
    kept: list[nn.Parameter] = []
    for part in (part for module in modules for part in module.modules()):
        for key, mine in part._parameters.items():
            if mine is None:
                continue
            same = next(
                (p for p in kept if p.shape == mine.shape and p.dtype == mine.dtype and torch.equal(p, mine)), mine
            )
            part._parameters[key] = same
            kept.append(same)


def replaced(net: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The net with another module at this name and at all further names of the same one."""
    if not name:
        return module
    old = net.get_submodule(name)
    for each in [n for n, m in net.named_modules(remove_duplicate=False) if m is old]:
        net.set_submodule(each, module)
    return net
