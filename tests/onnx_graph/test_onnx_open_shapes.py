"""Models whose inputs or outputs have open sizes, or no number of axes at all."""

import numpy as np
import onnx
import pytest

from hodec.errors import ConfigError, PlanError, Use
from hodec.onnx_graph.decompose import decompose_file
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.sizes import input_sizes
from hodec.ranks import Manual

from small_graphs import answer, conv_net, helper, node, numbers, save  # isort: skip


def bare(path, *, inputs=True, outputs=True):
    """The model file with inputs or outputs that have no shape."""
    model = onnx.load(str(path))
    for wanted, values in ((inputs, model.graph.input), (outputs, model.graph.output)):
        for value in values if wanted else ():
            value.type.tensor_type.ClearField("shape")
    onnx.save(model, str(path))
    return path


def test_an_input_without_a_shape_is_named_with_the_option_that_mends_it(tmp_path):
    source = bare(conv_net(tmp_path / "in.onnx"))
    with pytest.raises(ConfigError, match="input x has no shape, not even .* shapes={'x': .1, 3, 224, 224.}$") as error:
        decompose_file(source, tmp_path / "out.onnx", rule=Manual(4))
    assert "in.onnx" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("outputs", [True, False])
def test_with_the_option_it_is_decomposed_as_with_a_shape_of_its_own(tmp_path, inputs, outputs):
    whole, source = conv_net(tmp_path / "whole.onnx"), conv_net(tmp_path / "in.onnx")
    bare(source, inputs=inputs, outputs=outputs)
    before = source.read_bytes()
    made = [
        decompose_file(one, tmp_path / f"out{k}.onnx", rule=Manual(4), shapes={"x": (1, 8, 10, 12)})
        for k, one in enumerate((whole, source))
    ]
    assert made[1].changes == made[0].changes
    assert (made[1].before, made[1].after) == (made[0].before, made[0].after)
    assert made[1].remarks == ()
    assert source.read_bytes() == before
    x = np.random.default_rng(0).standard_normal((3, 8, 10, 12)).astype(np.float32)
    np.testing.assert_array_equal(*(answer(tmp_path / f"out{k}.onnx", x=x)[0] for k in range(2)))


def test_only_the_number_of_axes_is_written_into_the_model(tmp_path):
    source, out = bare(conv_net(tmp_path / "in.onnx")), tmp_path / "out.onnx"
    decompose_file(source, out, rule=Manual(4), shapes={"x": (1, 8, 10, 12)})
    graph = onnx.load(str(out)).graph
    for value, axes in ((graph.input[0], 4), (graph.output[0], 2)):
        assert [dim.WhichOneof("value") for dim in value.type.tensor_type.shape.dim] == [None] * axes


def test_several_inputs_without_a_shape_are_named_together(tmp_path):
    nodes = [node("Conv", "a w", "h"), node("Conv", "b w", "k"), node("Add", "h k")]
    inputs = {"a": ("n", 8, 10, 12), "b": ("n", 8, 10, 12)}
    model = load_graph(bare(save(tmp_path / "in.onnx", nodes, {"w": numbers(16, 8, 3, 3)}, inputs=inputs)))
    with pytest.raises(
        ConfigError, match="input a, b has no shape.* shapes={'a': .1, 3, 224, 224., 'b': .1, 3, 224, 224.}$"
    ):
        input_sizes(model, {})
    with pytest.raises(ConfigError, match="input b has no shape"):
        input_sizes(model, {"a": (1, 8, 10, 12)})


def test_open_channels_are_those_of_the_convolution_that_reads_them(tmp_path):
    nodes = [node("Conv", "x w", group=2)]
    inputs = {"x": ("n", "c", "h", "w")}
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(16, 8, 3, 3)}, inputs=inputs)
    assert input_sizes(load_graph(source), {}) == {"x": (1, 16, 224, 224)}


def test_layers_of_unknown_size_name_the_input(tmp_path):
    nodes = [helper.make_node("Odd", ["x"], ["h"], domain="own"), node("Conv", "h w", name="first")]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(16, 8, 3, 3)}, domains=("own",))
    with pytest.raises(
        PlanError, match="Conv first, 100.0% .*: the sizes .* are not known.* run it on x .*8.*Give"
    ) as error:
        decompose_file(source, tmp_path / "out.onnx", rule=Manual(4))
    assert error.value.told(Use.in_flags).endswith("Give other inputs with --shape x:1,8,10,12")


def test_an_output_that_nothing_sizes_is_named(tmp_path):
    nodes = [node("Conv", "x w", "h", name="first"), helper.make_node("Odd", ["h"], ["y"], domain="own")]
    source = bare(save(tmp_path / "in.onnx", nodes, {"w": numbers(16, 8, 3, 3)}, domains=("own",)), inputs=False)
    with pytest.raises(ConfigError, match="output y has no shape.* in place of shapes={'x': .1, 8, 10, 12.}$"):
        decompose_file(source, tmp_path / "out.onnx", rule=Manual(4))


def test_sizes_that_the_model_does_not_run_on_are_said(tmp_path):
    source = bare(conv_net(tmp_path / "in.onnx"))
    made = decompose_file(source, tmp_path / "out.onnx", rule=Manual(4), shapes={"x": (1, 4, 10, 12)})
    assert made.difference is None
    assert "does not run the given model on x float32 (1, 4, 10, 12) (" in made.remarks[0]
