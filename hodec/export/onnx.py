"""A compressed model as an ONNX file, in float32, float16 or int8, verified by running it in ONNX Runtime."""

import inspect
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hodec.compare import batch_sizes, verified
from hodec.errors import ConvertError, first_line, near_matches
from hodec.export.layer_errors import check_layers, layer_errors
from hodec.export.program import Exported, cause, checked_path, exported_program, plain_net
from hodec.export.runtime import Calls, arrays, quiet, session
from hodec.inference import settled_input, uncompiled
from hodec.inputs import Inputs, ModelInput, as_input
from hodec.io.atomic import write_bytes
from hodec.layers.plain import copied

# How far outputs may be from the model's, relative to their norm. Rounding to 8 bits costs several percent in deep
# nets, and a net with shortcuts that lost a layer may differ by as little: int8 is compared layer by layer as well.
ALLOWED = {"fp32": 1e-3, "fp16": 5e-2, "int8": 0.5}


def to_onnx(  # noqa: PLR0913
    model: nn.Module,
    path: str | Path,
    *,
    example_input: Inputs,
    dynamic_batch: bool = True,
    verify: bool = True,
    precision: str = "fp32",
    calibration: Iterable[Inputs] | None = None,
) -> Exported:
    """Write a model as ONNX; factorized layers come out as plain convolutions and matrix products.

    Args:
        model: what ``fuse`` made; or a compressed model, which is brought into plain layers first.
        path: ends in ``.onnx``; an existing file is replaced, in one move.
        example_input: as the model takes, batch first; see ``hodec.make_plan``.
        dynamic_batch: let the file take any batch size.
        verify: run the file in ONNX Runtime at several batch sizes and compare the outputs; on the first of the
            ``calibration`` batches where there are any.
        precision: ``fp32``; ``fp16`` (inputs and outputs stay float32); or ``int8``.
        calibration: ``int8``: batches of inputs from which the ranges of all activations are read. Without them,
            ranges are found anew at each call, which needs no data and is slower. What stands behind the inputs in
            a batch (labels) is not used.

    Raises:
        CheckpointError: a path with another ending, or one that cannot be written.
        ConvertError: onnx is not installed, the model cannot be exported, the file gives other outputs.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> written = hodec.to_onnx(hodec.convert(net, plan), "small.onnx", example_input=torch.zeros(1, 64))
        >>> written.path.name
        'small.onnx'
    """
    path = checked_path(path, ".onnx")
    batches = _checked(model, precision, calibration)
    _check_installed("onnx", "onnxscript", *(["onnxruntime"] if verify or precision == "int8" else []))
    inputs = settled_input(uncompiled(model), example_input)
    net = plain_net(model, inputs)
    names = _input_names(net, inputs)
    floats = content = _content(HalfInside(net) if precision == "fp16" else net, inputs, dynamic_batch, names)
    if precision == "int8":
        content = _quantized(content, batches)
    error, sizes = None, batch_sizes(inputs, dynamic_batch) if verify else ()
    if verify:
        # ranges that were read from data say nothing about other inputs
        like = inputs if batches is None else batches[0]
        error = verified(str(path), session(content), net, like, sizes, allowed=ALLOWED[precision])
        if precision == "int8":
            check_layers(str(path), layer_errors(floats, content, like.tensors))
    write_bytes(path, content)
    return Exported(path, error, sizes, nodes_of(content))


def _checked(model: nn.Module, precision: str, calibration: Iterable[Inputs] | None) -> list[ModelInput] | None:
    """The calibration batches, if the settings go together."""
    if precision not in ALLOWED:
        hint = near_matches(precision, tuple(ALLOWED))
        raise ConvertError(f"precision={precision!r} is not one of {', '.join(ALLOWED)}.{hint}")
    batches = None if calibration is None else [as_input(batch, uncompiled(model)) for batch in calibration]
    if batches is not None and precision != "int8":
        raise ConvertError(f"calibration is for precision='int8', but {precision!r} is given")
    if batches == []:
        raise ConvertError("calibration has no batches; give some, or calibration=None")
    return batches


class HalfInside(nn.Module):
    """A net computed in float16 that takes and gives float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copied(net).half()

    def forward(self, *args: object, **kwargs: object) -> object:
        inputs = ModelInput(args, kwargs).map(lambda x: x.half() if x.is_floating_point() else x)
        return tree_map_only(Tensor, lambda y: y.float() if y.is_floating_point() else y, inputs.run(self.net))


def nodes_of(content: bytes) -> dict[str, int]:
    """Operator -> how often it stands in an ONNX file."""
    import onnx

    return dict(Counter(node.op_type for node in onnx.load_model_from_string(content).graph.node))


def _check_installed(*modules: str) -> None:
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ConvertError(f"ONNX export needs {', '.join(missing)}: pip install 'hodec[export]'")


def _input_names(net: nn.Module, inputs: ModelInput) -> list[str] | None:
    """The names of the net's first inputs; None where they are not all tensors, or it leaves their names open."""
    if inputs.kwargs or len(inputs.tensors) != len(inputs.args):
        return None
    count = len(inputs.args)
    first = list(inspect.signature(net.forward).parameters.values())[:count]
    named = [p.name for p in first if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return named if len(named) == count else None


def _content(net: nn.Module, inputs: Inputs, dynamic_batch: bool, names: list[str] | None) -> bytes:
    """The net as the bytes of an ONNX file."""
    program = exported_program(net, inputs, dynamic_batch=dynamic_batch)
    try:
        with quiet():  # the exporter warns about its own insides
            made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names)
        if made is None:
            raise RuntimeError("torch.onnx.export made nothing")
        if made.model_proto.ByteSize() >= 2**31:
            raise ConvertError("the model is above 2 GiB, more than one ONNX file holds; to_program writes it as .pt2")
        content: bytes = made.model_proto.SerializeToString()
        return content
    except ConvertError:
        raise
    except Exception as error:
        reason = cause(error)
        raise ConvertError(f"the model cannot be written as ONNX ({reason}); to_program writes it as .pt2") from error


def _quantized(content: bytes, batches: Sequence[Inputs] | None) -> bytes:
    """The same graph in 8 bits: ranges from the batches, or found at each call."""
    import onnx
    from onnxruntime import quantization

    model = onnx.load_model_from_string(content)
    constants = {each.name for each in model.graph.initializer}
    names = [each.name for each in model.graph.input if each.name not in constants]
    del model.graph.value_info[:]  # the quantizer transposes weights and would find their old shapes here
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = (str(Path(folder) / name) for name in ("floats.onnx", "int8.onnx"))
        onnx.save(model, source)
        if batches is None:
            # the CPU has no integer convolution with signed weights
            quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType.QUInt8)
        else:
            feeds = Calls(arrays(names, as_input(batch).tensors) for batch in batches)  # labels have no name
            try:
                quantization.quantize_static(source, target, feeds, per_channel=True)
            except Exception as error:  # the runtime's own kinds, e.g. for batches of another size
                raise ConvertError(
                    f"calibration: the model does not run on these batches ({first_line(error)}); give inputs as the "
                    "model takes"
                ) from error
        return Path(target).read_bytes()
