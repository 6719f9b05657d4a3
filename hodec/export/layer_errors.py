"""How far each layer of a quantized file is from the same layer of the file it was made from."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hodec.errors import ConvertError
from hodec.export.runtime import session

# Nodes that hold the weights of a net. One whose output the quantizer drops is judged by those that read it.
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def layer_errors(floats: bytes, quantized: bytes, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Relative distance of each layer's outputs in two ONNX files, name of the output -> distance.

    The mean of each channel is left out of it: biases alone, which a layer without its weights still has, can make
    up most of an output. So that a linear layer's outputs vary for a single input, half and a tenth of it are run too.

    Args:
        floats, quantized: the files' bytes; tensors that stand for each other have one name in both.
        inputs: as the files take.
    """
    import onnx

    models = [onnx.load_model_from_string(content) for content in (floats, quantized)]
    made = {name for node in models[1].graph.node for name in node.output}
    shared = [node.output[0] for node in models[0].graph.node if node.op_type in LAYERS and node.output[0] in made]
    outputs = []
    for model in models:
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shared)
        run = session(model.SerializeToString())
        runs = [run(*(x * ratio if x.is_floating_point() else x for x in inputs)) for ratio in (1.0, 0.5, 0.1)]
        outputs.append([torch.cat(parts) for parts in zip(*runs, strict=True)])
    return {name: _varying_distance(b, a) for name, a, b in zip(shared, *outputs, strict=True)}


def _varying_distance(result: Tensor, expected: Tensor, *, steady: float = 0.02) -> float:
    """norm(result - expected) / norm(expected), channels (N, C, ..) or (N, .., C) taken without their means.

    Outputs that vary by less than ``steady`` of themselves say little about the layer: rounding alone is as large.
    """
    result, expected = result.double(), expected.double()
    if not bool(result.isfinite().all()):
        return math.inf
    apart, norm = float(_varying(result - expected).norm()), float(_varying(expected).norm())
    return apart / max(norm, steady * float(expected.norm())) if apart else 0.0


def _varying(t: Tensor) -> Tensor:
    rest = [k for k in range(t.ndim) if k != (1 if t.ndim >= 4 else t.ndim - 1)]
    if math.prod(t.shape[k] for k in rest) <= 1:
        return t  # one number a channel is its own mean
    return t - t.mean(dim=rest, keepdim=True)


def check_layers(what: str, errors: Mapping[str, float], *, allowed: float = 0.5) -> None:
    """Refuse a file one of whose layers computes something else.

    Args:
        allowed: random and trained nets are below 0.2 where the file is right, and at 1 where a layer has lost its
            weights.

    Raises:
        ConvertError: naming the layer's output.
    """
    for name, error in errors.items():
        if not error <= allowed:
            raise ConvertError(
                f"{what} does not give the outputs of the model: those of its layer {name!r} differ by {error:.2g} of "
                f"what varies there (allowed {allowed:g}); give calibration batches like the data, or 'fp16'; "
                "verify=False writes it all the same"
            )
