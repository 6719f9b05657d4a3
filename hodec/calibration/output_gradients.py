"""How much each of a layer's outputs counts for what the net gives: second moments of gradients.

A change e of a layer's outputs y changes what the net gives by J e at one position, to first order. With independent
random numbers u of variance 1 for the net's outputs, g = J^T u has the second moment E[g g^T] = E[J^T J] = G, and

    E |J e|^2 = tr (G E[e e^T])

A weight Z in place of W makes e = (W - Z) x, so that its loss is norm(G^(1/2) (W - Z) C^(1/2))^2, where C is the second
moment of the layer's inputs. Gradients and inputs are taken to be independent of each other, and those of one position
of those of another. No label is needed, and no weight is moved.

This is the Gauss-Newton matrix of the squared error of the net's outputs. With labels drawn from a softmax it would be
Fisher's: that saturates where a net is sure of its training data, so that layers seem to count for nothing.

Source: Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015; Grosse
and Martens, A Kronecker-factored Approximate Fisher Matrix for Convolution Layers, ICML 2016.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hodec.calibration.fit import fittable
from hodec.calibration.input_covariance import InputCovariance
from hodec.compare import tensors_in
from hodec.errors import ConfigError, DataError, TrainingError
from hodec.formats.layer_types import LAYER_TYPES
from hodec.inference import Batch, inference, run_on, uncompiled
from hodec.inputs import ModelInput, as_input, required
from hodec.linalg.svd import sqrtm_psd
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan, check_plan

# Images that go backward at a time: a backward pass keeps what every layer gave.
IMAGES = 4


@dataclass(frozen=True)
class OutputGradient:
    """How much a layer's outputs count.

    Attributes:
        root: G^(1/2) for a mean eigenvalue of 1, symmetric (O, O), float64.
        importance: what the net's outputs would lose with all of the layer's, E |J y|^2, summed over positions and
            per image; 1 on average over layers.
    """

    root: Tensor
    importance: float


@dataclass(frozen=True)
class TwoSided:
    """An input covariance with the root of the output gradients: distances are those of what the net gives."""

    inputs: InputCovariance
    gradient: OutputGradient | None

    def check(self, name: str, layer: LayerPlan) -> "TwoSided":
        """This, if projecting in it keeps the ranks of ``layer``.

        Raises:
            PlanError: it was collected for a plan that splits or factorizes the layer differently.
        """
        self.inputs.check(name, layer)
        return self if len(layer.modes.outputs) == 1 else TwoSided(self.inputs, None)

    def apply(self, weight: Tensor) -> Tensor:
        """Weights (O, I, K..) -> G^(1/2) W C^(1/2), float64."""
        white = self.inputs.apply(weight)
        if self.gradient is None:
            return white
        return (self.gradient.root.to(white.device) @ white.flatten(1)).reshape(white.shape)


def collect_output_gradients(
    model: nn.Module, plan: Plan, batches: Iterable[Batch], *, damping: float = 1e-2, seed: int = 0
) -> dict[str, OutputGradient]:
    """How much the outputs of each planned layer count for those of the net, from one backward pass of each batch.

    The model is run in evaluation mode and left as it was; what it gives first that is a tensor of floating point
    counts. Layers whose outputs are no use of one weight (``fittable`` says which) are left out, and so are those that
    what the net gives does not depend on.

    Args:
        model: the dense model the plan was made for.
        batches: as ``collect_covariances`` takes them.
        damping: least eigenvalue of G, as a share of the mean one, 0 < damping <= 1.
        seed: of the random numbers.

    Raises:
        ConfigError: a setting out of range, or a call within ``torch.inference_mode``.
        DataError: no batch, one that the model does not run on, or a net that gives no tensor of floating point.
        TrainingError: a layer's output, or the gradient there, holds NaN or Inf.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
        >>> images = [torch.randn(16, 3, 8, 8)]
        >>> plan = hodec.make_plan(net, 2, method="svd", example_input=images[0])
        >>> gradients = hodec.collect_output_gradients(net, plan, images)
        >>> gradients["0"].root.shape
        torch.Size([8, 8])
        >>> roots = {name: one.root for name, one in gradients.items()}
        >>> small = hodec.fit_to_data(net, plan, images, output_roots=roots)
    """
    check_plan(plan)
    if not 0 < damping <= 1:
        raise ConfigError(f"damping: {damping!r} given; allowed: a number above 0 and at most 1; 1e-2 suits most nets")
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "collect_output_gradients, which hodec.compress calls for data: not in torch.inference_mode()"
        )
    model, generator = uncompiled(model), torch.Generator().manual_seed(seed)
    count = len(plan.example_input().args) or None
    sums = {name: _Sums(layer) for name, layer in plan.items() if fittable(layer)}
    used = 0
    # cuDNN has no backward pass of recurrent layers in evaluation mode
    with inference(model), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False), ExitStack() as stack:
        for name, one in sums.items():
            stack.callback(model.get_submodule(name).register_forward_hook(one.probe).remove)
        for given in _pieces(model, batches, count):
            used += 1
            _backward(model, given, sums.values(), generator)
    if not used:
        raise DataError("no batch to collect gradients from: give at least one, a few hundred images are enough")
    for name, one in sums.items():
        if not bool((one.outputs + one.gradients).isfinite().all()):
            raise TrainingError(
                f"layer {name}: its output on the calibration data, or the gradient there, holds NaN or Inf; look at "
                "the data and at the net"
            )
    found = {name: one for name, one in sums.items() if one.positions and float(one.gradients.diagonal().sum()) > 0}
    energies = {name: float((one.gradients * one.outputs).sum()) / one.positions for name, one in found.items()}
    mean = sum(energies.values()) / max(1, len(energies)) or 1.0
    return {n: OutputGradient(sqrtm_psd(one.gradients, damping)[0], energies[n] / mean) for n, one in found.items()}


def two_sided(
    covariances: Mapping[str, Mapping[str, InputCovariance]], gradients: Mapping[str, OutputGradient]
) -> dict[str, dict[str, TwoSided]]:
    """Layer -> method -> covariance, with the gradients where there are some; for ``Budget(covariances=)``, beside
    ``weights`` of the importances.
    """
    return {
        name: {method: TwoSided(one, gradients.get(name)) for method, one in by_method.items()}
        for name, by_method in covariances.items()
    }


def _pieces(model: nn.Module, batches: Iterable[Batch], count: int | None) -> Iterator[ModelInput]:
    """The batches' images, some at a time."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        whole = as_input(batch, model, most=required(model) if count is None else count).to(device)
        size = whole.batch
        for at in range(0, size, IMAGES):
            part = slice(at, at + IMAGES)
            yield whole.map(lambda x, part=part, size=size: x[part] if x.ndim and len(x) == size else x)  # type: ignore[misc]


def _backward(model: nn.Module, given: ModelInput, sums: Iterable["_Sums"], generator: torch.Generator) -> None:
    """One backward pass from random numbers, and no weight gets a gradient."""
    output = next((x for x in tensors_in(run_on(model, given)) if x.is_floating_point()), None)
    if output is None:
        raise DataError("the net gives no tensor of numbers, so that no gradient of it tells what its layers count for")
    probes = [(one, probe) for one in sums for probe in one.probes]
    if output.requires_grad and probes:
        noise = torch.randn(output.shape, generator=generator).to(output)
        found = torch.autograd.grad(output, [probe for _, probe in probes], noise, allow_unused=True)
        for (one, _), gradient in zip(probes, found, strict=True):
            if gradient is not None:
                one.see(gradient)
    for one, _ in probes:
        one.probes = []


class _Sums:
    """Second moments of a layer's outputs and of the gradients there, (O, O), float64."""

    def __init__(self, layer: LayerPlan) -> None:
        self.dims, out = LAYER_TYPES[layer.layer_type].dims, layer.shape[0]
        self.outputs, self.gradients = (torch.zeros(out, out, dtype=torch.float64) for _ in range(2))
        self.positions = 0
        self.probes: list[Tensor] = []

    def probe(self, _m: nn.Module, _a: object, output: Tensor) -> Tensor:
        """Add the output of one call, and zeros to it, whose gradient is the output's whatever changes that later."""
        self.outputs += self._moment(output)
        self.probes.append(torch.zeros_like(output, requires_grad=True))
        return output + self.probes[-1]

    def see(self, gradient: Tensor) -> None:
        """Add the gradient of one call's output."""
        self.gradients += self._moment(gradient)
        self.positions += gradient.numel() // len(self.gradients)

    def _moment(self, x: Tensor) -> Tensor:
        """Sum of products (O, O) of (N, O, ..) or (.., O) over all positions."""
        rows = x.detach().float()
        rows = rows.flatten(0, -2) if not self.dims else rows.movedim(-self.dims - 1, -1).flatten(0, -2)
        return (rows.mT @ rows).cpu().double()
