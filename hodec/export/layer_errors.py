"""How far each layer of a quantized file is from the same layer of the file it was made from."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hodec.errors import ConvertError

IMAGE_RANK = 4

# Nodes that hold the numbers of a net. One whose output the quantizer drops is judged by those that read it.
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# Measured on random and trained nets: below 0.2 where the file is right, 1 where a layer has lost its weights.
ALLOWED = 0.5

# Outputs that vary by less than this share of themselves say little about the layer: rounding alone is as large.
STEADY = 0.02

# Inputs are run at these shares of themselves.
PALER = (1.0, 0.5, 0.1)

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def layer_errors(
    whole: bytes, quantized: bytes, inputs: Sequence[Tensor], *, session: Callable[[bytes], Run]
) -> dict[str, float]:
    """Relative distance of each layer's outputs in two ONNX files, name of the output -> distance.

    The mean of each channel is left out of it: biases alone, which a layer without its weights still has, can make
    up most of an output. So that a linear layer's outputs vary for a single input, paler ones are run as well.

    Args:
        whole, quantized: the files' bytes; tensors that stand for each other have one name in both.
        inputs: as the files take.
        session: the bytes of a file -> what runs it.
    """
    import onnx

    models = [onnx.load_model_from_string(content) for content in (whole, quantized)]
    made = {name for node in models[1].graph.node for name in node.output}
    shared = [node.output[0] for node in models[0].graph.node if node.op_type in LAYERS and node.output[0] in made]
    outputs = []
    for model in models:
        run = session(_with_outputs(model, shared))
        runs = [run([x * share if x.is_floating_point() else x for x in inputs]) for share in PALER]
        outputs.append([torch.cat(parts) for parts in zip(*runs, strict=True)])
    return {name: _varying_distance(b, a) for name, a, b in zip(shared, *outputs, strict=True)}


def _with_outputs(model: Any, names: Sequence[str]) -> bytes:
    from onnx import ValueInfoProto

    del model.graph.output[:]
    model.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return model.SerializeToString()  # type: ignore[no-any-return]


def _varying_distance(given: Tensor, wanted: Tensor) -> float:
    """norm(given - wanted) / norm(wanted), channels (N, C, ..) or (N, .., C) taken without their means."""
    made, right = given.double(), wanted.double()
    if not bool(made.isfinite().all()):
        return math.inf
    apart, norm = float(_varying(made - right).norm()), float(_varying(right).norm())
    return apart / max(norm, STEADY * float(right.norm())) if apart else 0.0


def _varying(t: Tensor) -> Tensor:
    rest = [k for k in range(t.ndim) if k != (1 if t.ndim >= IMAGE_RANK else t.ndim - 1)]
    if math.prod(t.shape[k] for k in rest) <= 1:
        return t  # one number a channel is its own mean
    return t - t.mean(dim=rest, keepdim=True)


def check_layers(what: str, errors: Mapping[str, float]) -> None:
    """Refuse a file one of whose layers computes something else.

    Raises:
        ConvertError: naming the layer's output.
    """
    for name, error in errors.items():
        if not error <= ALLOWED:
            raise ConvertError(
                f"{what} does not give the outputs of the model: those of its layer {name!r} differ by {error:.2g} of "
                f"what varies there (allowed {ALLOWED:g}); give calibration batches like the data, or 'fp16'; "
                "verify=False writes it all the same"
            )
