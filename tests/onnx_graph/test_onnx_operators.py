"""Operators beside plain convolutions and products: groups, tables, Einsum, leading axes, recurrent weights."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hodec.errors import PlanError
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Budget, Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import FLOAT, answer, kinds, node, numbers, relative, save  # isort: skip

ANY = PlanSettings(allow_larger=True)


def decomposed(source, method="svd", rule=None, **more):
    """What came of it, and the outputs of both files on the same inputs."""
    out = source.with_name("out.onnx")
    options = more.pop("options", ANY)
    return decompose_file(source, out, method=method, rule=rule or Manual(10**6), options=options, **more), out


@pytest.mark.parametrize("method", ["svd", "weight_svd", "spatial_svd", "tucker", "tt", "cp", "cp3"])
def test_a_grouped_convolution_is_decomposed_group_by_group(tmp_path, method):
    rng = np.random.default_rng(0)
    per_group = np.stack([  # three groups of rank 2 in every sense: outer products of two terms
        np.einsum("ro,ri,rh,rw->oihw", *(rng.standard_normal((2, n)) for n in (8, 4, 3, 3))) for _ in range(3)
    ])  # fmt: skip
    weights = {"w": per_group.reshape(24, 4, 3, 3).astype(np.float32), "b": numbers(24)}
    nodes = [node("Conv", "x w b", "y", name="c", group=3, pads=[1, 0, 1, 0], strides=[2, 1])]
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": ("n", 12, 9, 10)})
    # CP of rank 2 meets such tensors only to its own tolerance
    rank, tolerance = (2, 5e-2) if method.startswith("cp") else (4, 1e-4)
    outcome, out = decomposed(source, method, Manual(rank))
    assert outcome.plan["c"].groups == 3
    x = rng.standard_normal((2, 12, 9, 10)).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < tolerance
    assert outcome.after.macs == outcome.plan.macs_after
    attributes = [{one.name: one.i for one in made.attribute} for made in onnx.load(str(out)).graph.node]
    assert all(one["group"] % 3 == 0 for one in attributes)
    again, _ = decomposed(source, method, plan=outcome.plan, force=True)
    assert again.changes == outcome.changes


def test_a_table_becomes_a_narrow_one_and_a_product(tmp_path):
    table = (numbers(50, 4) @ numbers(4, 24, seed=1)).astype(np.float32)
    nodes = [node("Gather", "table ids", "h", name="words"), node("Relu", "h", "y")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ("n", 7))
    unused = {"x": ("n", 1)}
    source = save(tmp_path / "in.onnx", nodes, {"table": table}, inputs=unused, extra_inputs=(ids,))
    outcome, out = decomposed(source, rule=Manual(4), options=PlanSettings())
    assert kinds(out) == ["Gather", "MatMul", "Relu"]
    feeds = {"x": np.zeros((3, 1), np.float32), "ids": np.random.default_rng(0).integers(50, size=(3, 7))}
    assert relative(answer(out, **feeds)[0], answer(source, **feeds)[0]) < 1e-5
    assert (outcome.before.params, outcome.after.params) == (50 * 24, 4 * (50 + 24))
    assert (outcome.before.macs, outcome.after.macs) == (0, 7 * 4 * 24)


def test_a_budget_of_multiply_adds_leaves_tables_alone(tmp_path):
    nodes = [node("Gather", "table ids", "h", name="words"), node("MatMul", "h w", "y", name="m")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ("n", 7))
    weights = {"table": numbers(50, 24), "w": numbers(24, 24, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": ("n", 1)}, extra_inputs=(ids,))
    outcome, _ = decomposed(source, rule=Budget(macs=0.5), options=PlanSettings())
    assert list(outcome.changes) == ["m"]


@pytest.mark.parametrize(("equation", "shape", "axes"), [
    ("bsd,dh->bsh", (12, 20), 3), ("bsd,hd->bsh", (20, 12), 3), ("ij, jk -> ik", (12, 20), 2),
    ("abcd,de->abce", (12, 20), 4),
])  # fmt: skip
def test_an_einsum_that_is_a_plain_product(tmp_path, equation, shape, axes):
    size = (2, 3, 5, 12)[4 - axes :]
    nodes = [node("Einsum", "x w", "y", name="e", equation=equation)]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(*shape)}, inputs={"x": size})
    outcome, out = decomposed(source)
    assert kinds(out) == ["MatMul", "MatMul"]
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4
    assert outcome.plan["e"].shape == (20, 12)


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,jk->ki", "ij,kj->i"])
def test_other_einsums_stay_with_the_reason(tmp_path, equation):
    shape = {"ij,ij->ij": (12, 12), "ij,jk->ki": (12, 20), "ij,kj->i": (20, 12)}[equation]
    nodes = [node("Einsum", "x w", "h", name="e", equation=equation), node("MatMul", "x v", "z", name="m")]
    weights = {"w": numbers(*shape), "v": numbers(12, 20, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (12, 12)}, outputs=("h", "z"))
    outcome, _ = decomposed(source)
    assert outcome.plan.skipped["e"].startswith("an Einsum that is no plain product")
    assert outcome.plan.skipped_costs["e"][0] == np.prod(shape)


@pytest.mark.parametrize(("words", "shape", "size"), [
    ("x w", (1, 12, 20), (5, 12)), ("x w", (1, 1, 12, 20), (2, 5, 12)), ("w x", (1, 20, 12), (12, 5)),
    ("x w", (1, 12, 20), (2, 3, 5, 12)),
])  # fmt: skip
@pytest.mark.parametrize("method", ["svd", "tt"])
def test_products_with_leading_axes_of_one(tmp_path, words, shape, size, method):
    nodes = [node("MatMul", words, "h", name="m"), node("MatMul", "h v", "y", name="n")]
    weights = {"w": numbers(*shape), "v": numbers(20 if words == "x w" else 5, 6, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": size})
    settings = PlanSettings(allow_larger=True, execution="chain" if method == "tt" else "auto")
    outcome, out = decomposed(source, method, options=settings)
    assert ("m" in outcome.changes) == (method == "svd" or len(size) >= len(shape))
    if "m" not in outcome.changes:
        assert "would drop the axes" in outcome.plan.skipped["m"]
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4


RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent_net(path, kind, directions, rank=None):
    """A recurrent node whose weights have this rank, and a product."""
    hidden, gates = 16, RECURRENT[kind]
    shapes = {"w": (directions, gates * hidden, 12), "r": (directions, gates * hidden, hidden)}
    weights = {}
    for name, (d, rows, columns) in shapes.items():
        k = rank or min(d * rows, columns)
        weights[name] = (numbers(d * rows, k) @ numbers(k, columns, seed=1)).reshape(d, rows, columns)
    words = "bidirectional" if directions == 2 else "forward"
    nodes = [
        node(kind, "x w r", "h", name="memory", hidden_size=hidden, direction=words),
        node("MatMul", "h v", "y", name="m"),
    ]
    return save(path, nodes, {**weights, "v": numbers(16, 16, seed=2)}, inputs={"x": (5, 1, 12)})


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_weights_are_products_that_the_runtime_multiplies_out(tmp_path, kind, directions):
    source = recurrent_net(tmp_path / "in.onnx", kind, directions, rank=3)
    outcome, out = decomposed(source, rule=Manual(3), options=PlanSettings(include="memory.*"))
    assert kinds(out) == ["MatMul", "MatMul", kind, "MatMul"]
    x = np.random.default_rng(0).standard_normal((5, 1, 12)).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4
    rows = directions * RECURRENT[kind] * 16
    assert outcome.before.macs == outcome.after.macs == rows * (12 + 16) + directions * 16 * 16
    assert outcome.before.params - outcome.after.params == rows * (12 + 16) - 3 * (2 * rows + 12 + 16)
    again, _ = decomposed(source, plan=outcome.plan, force=True)
    assert again.changes == outcome.changes


def test_a_recurrent_weight_is_no_tensor_train(tmp_path):
    outcome, _ = decomposed(recurrent_net(tmp_path / "in.onnx", "LSTM", 1), method="tucker", rule=Budget(macs=0.9))
    assert list(outcome.changes) == ["m"]
    source = recurrent_net(tmp_path / "in.onnx", "LSTM", 1)
    outcome, _ = decomposed(source, method="tt", options=PlanSettings(allow_larger=True, execution="chain"), force=True)
    assert "needs its weight whole" in outcome.plan.skipped["memory.R"]


def test_what_a_file_holds_is_named_where_nothing_can_be_decomposed(tmp_path):
    nodes = [node("Mul", "x w", "h", name="scale")]
    loop = helper.make_graph(
        [node("Identity", "on", "on_again"), node("Conv", "k q", "k_next", name="inside")], "body",
        [helper.make_tensor_value_info("step", TensorProto.INT64, []),
         helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("k", FLOAT, None)],
        [helper.make_tensor_value_info("on_again", TensorProto.BOOL, []),
         helper.make_tensor_value_info("k_next", FLOAT, None)],
    )  # fmt: skip
    nodes += [helper.make_node("Loop", ["times", "", "start"], ["y"], name="again", body=loop)]
    weights = {"w": numbers(5, 12), "q": numbers(4, 4, 1), "times": np.array(3), "start": numbers(1, 4, 6)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (5, 12)}, outputs=("y", "h"))

    with pytest.raises(PlanError) as error:
        decomposed(source, options=PlanSettings(), method="svd")
    text = str(error.value)
    assert "Mul scale, 60.0% of the parameters" in text
    assert "Conv inside, 16.0% of the parameters: it stands in the body of Loop again: those stay as they are" in text
