"""Files: what is refused, in one line, and what is never left half-written."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from hodec.errors import CheckpointError, ConfigError, ConvertError
from hodec.onnx_graph import writing
from hodec.onnx_graph.decompose import decompose_file
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.sizes import parse_shapes
from hodec.ranks import Manual

from small_graphs import answer, conv_net, node, numbers, relative, save  # isort: skip


def decompose(source, out, rank=5, **options):
    return decompose_file(source, out, method="tucker", rule=Manual(rank), **options)


def external(path: Path) -> Path:
    """The small net with its tensors in a file beside it."""
    model = onnx.load(str(conv_net(path)))
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.weights", size_threshold=0)
    return path


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "not an ONNX model"),
    (b"no model at all", "not an ONNX model"),
    (b"\x08\x08", "not an ONNX model"),
])  # fmt: skip
def test_files_that_are_no_models(tmp_path, content, reason):
    path = tmp_path / "in.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        load_graph(path)
    assert "in.onnx" in one_line(error.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_graph(tmp_path / "none.onnx")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_graph(tmp_path)
    source = conv_net(tmp_path / "in.onnx")
    with pytest.raises(ConvertError, match="folder .*nowhere does not exist"):
        decompose(source, tmp_path / "nowhere" / "out.onnx")
    with pytest.raises(ConvertError, match="is a folder"):
        decompose(source, tmp_path)


def test_every_truncation_is_refused_or_harmless(tmp_path):
    content = conv_net(tmp_path / "in.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for k in range(1, 20):
        path.write_bytes(content[: len(content) * k // 20])
        with pytest.raises(CheckpointError) as error:
            load_graph(path)
        assert "cut.onnx" in one_line(error.value)


@pytest.mark.parametrize("opset", [6, 999])
def test_versions_that_cannot_be_read(tmp_path, opset):
    model = onnx.load(str(conv_net(tmp_path / "in.onnx")))
    model.opset_import[0].version = opset
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=f"version {opset} of the ONNX operators; versions 7 to"):
        load_graph(tmp_path / "in.onnx")


def test_an_output_that_is_there_needs_force(tmp_path):
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    out.write_text("precious")
    with pytest.raises(ConvertError, match="is there already; force=True replaces it"):
        decompose(source, out)
    assert out.read_text() == "precious"
    decompose(source, out, force=True)
    assert len(load_graph(out).graph)


def test_the_input_is_never_touched(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    content = source.read_bytes()
    (tmp_path / "link.onnx").symlink_to(source)
    for out in (source, tmp_path / "link.onnx", tmp_path / "." / "in.onnx"):
        with pytest.raises(ConvertError, match="is the input itself"):
            decompose(source, out, force=True)
    decompose(source, tmp_path / "out.onnx")
    assert source.read_bytes() == content


@pytest.mark.parametrize("stage", ["check_file", "_check_outputs"])
def test_a_failed_check_leaves_everything_as_it_was(tmp_path, stage, monkeypatch):
    def fail(*_):
        raise ConvertError("made up")

    monkeypatch.setattr(f"hodec.onnx_graph.decompose.{stage}", fail)
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    out.write_text("precious")
    with pytest.raises(ConvertError, match="made up"):
        decompose(source, out, force=True)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EIO, "Input/output error")])
def test_a_full_disk_is_one_message_and_nothing_is_left_behind(tmp_path, monkeypatch, number, words):
    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("hodec.io.atomic.os.fsync", full)
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    out.write_text("precious")
    with pytest.raises(ConvertError, match=words) as error:
        decompose(source, out, force=True)
    one_line(error.value)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


SPACE = """
import resource, sys
from hodec.cli import main as cli
import hodec.onnx_graph.decompose, hodec.methods, hodec.ranks, onnxruntime
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_no_space_left_is_one_line_and_nothing_is_left_behind(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    argv = ["decompose", source, "-o", out, "--method", "tucker", "--ranks", "8", "--allow-larger"]
    done = subprocess.run(
        [sys.executable, "-c", SPACE, *map(str, argv)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "there is no space left; nothing was changed" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_tensors_outside_of_the_file_stay_outside(tmp_path):
    source, out = external(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    outcome = decompose(source, out, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*sorted(before), "out.onnx", "out.onnx.data"]
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert outcome.bytes_after == out.stat().st_size + (tmp_path / "out.onnx.data").stat().st_size
    assert all(one.name.startswith(("w", "b")) for one in onnx.load(str(out)).graph.initializer)
    plain = tmp_path / "plain.onnx"
    decompose(conv_net(tmp_path / "same.onnx"), plain, 8)
    x = np.random.default_rng(0).standard_normal((2, 8, 10, 12)).astype("float32")
    assert relative(answer(out, x=x)[0], answer(plain, x=x)[0]) < 1e-6


def test_tensors_in_attributes_are_kept_and_no_empty_file_is_left(tmp_path):
    nodes = [
        onnx.helper.make_node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(numbers(1, 8, 1, 1), "k")),
        node("Mul", "x k", "g"),
        node("Conv", "g w", name="c"),
    ]
    source, out = save(tmp_path / "in.onnx", nodes, {"w": numbers(16, 8, 3, 3)}), tmp_path / "out.onnx"
    whole, model = tmp_path / "whole.onnx", onnx.load(str(source))
    whole.write_bytes(source.read_bytes())
    options = {"location": "in.w", "size_threshold": 0, "convert_attribute": True}
    onnx.save(model, str(source), save_as_external_data=True, **options)
    decompose(source, out)
    assert not (tmp_path / "out.onnx.data").exists()  # factors of a few hundred bytes stay in the file
    decompose(whole, tmp_path / "plain.onnx")
    x = np.random.default_rng(0).standard_normal((2, 8, 10, 12)).astype("float32")
    assert relative(answer(out, x=x)[0], answer(tmp_path / "plain.onnx", x=x)[0]) < 1e-6


def test_replacing_a_model_replaces_its_data_and_no_other(tmp_path):
    source, out = external(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    for _ in range(3):
        decompose(source, out, 8, force=True)
        data = [path.name for path in tmp_path.iterdir() if path.suffix == ".data"]
        assert len(data) == 1
        x = np.zeros((1, 8, 10, 12), np.float32)
        answer(out, x=x)
    assert (tmp_path / "in.onnx.weights").exists()


def test_missing_and_foreign_data_files_are_refused(tmp_path):
    source = external(tmp_path / "in.onnx")
    weights = tmp_path / "in.onnx.weights"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"in.onnx.weights, which is missing"):
        load_graph(source)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError) as error:
        decompose(source, tmp_path / "out.onnx")
    one_line(error.value)
    model = onnx.load(str(source), load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../elsewhere"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="outside of its folder: refused"):
        load_graph(source)


def test_models_too_large_for_one_file_get_a_second_one(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_BYTES", 1000)
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    decompose(source, out, 8)
    model = onnx.load(str(out), load_external_data=False)
    assert (tmp_path / "out.onnx.data").stat().st_size > 4096
    large = [one for one in model.graph.initializer if one.external_data]
    assert all(int(one.external_data[1].value) % 4096 == 0 for one in large)
    answer(out, x=np.zeros((1, 8, 10, 12), np.float32))


@pytest.mark.slow
def test_a_model_of_more_than_two_gigabytes(tmp_path):
    """Eight matrices of 270 MB in a data file, each of rank 2, narrow and wide in turns."""
    narrow, wide, weights = 256, 2**18 + 1024, 8
    data, generator = tmp_path / "big.weights", np.random.default_rng(0)
    shapes = [(narrow, wide) if k % 2 == 0 else (wide, narrow) for k in range(weights)]
    with data.open("wb") as stream:
        for rows, cols in shapes:
            left, right = (generator.standard_normal((n, 2)).astype("float32") / rows**0.5 for n in (rows, cols))
            stream.write((left @ right.T).tobytes())
    nodes = [node("MatMul", f"h{k} w{k}", f"h{k + 1}", name=f"m{k}") for k in range(weights)]
    ends = [onnx.helper.make_tensor_value_info(f"h{k}", 1, ("n", narrow)) for k in (0, weights)]
    graph = onnx.helper.make_graph(nodes, "big", ends[:1], ends[1:])
    for k, shape in enumerate(shapes):
        tensor = graph.initializer.add(name=f"w{k}", data_type=1, dims=shape, data_location=1)
        size = narrow * wide * 4
        for key, value in (("location", data.name), ("offset", k * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    source = tmp_path / "big.onnx"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    source.write_bytes(model.SerializeToString())
    assert data.stat().st_size > 2**31
    outcome = decompose_file(source, tmp_path / "out.onnx", method="svd", rule=Manual(2))
    assert len(outcome.changes) == weights
    assert outcome.difference < 1e-3
    assert outcome.bytes_after < outcome.bytes_before / 100


@pytest.mark.parametrize("text", ["x", "x:", "x:0,1", "x:1,a", ":1,2", "x:1,,2"])
def test_shapes_of_another_form(text):
    with pytest.raises(ConfigError, match="NAME:1,3,224,224"):
        parse_shapes([text])


@pytest.mark.parametrize(("given", "reason"), [
    ({"z": (1, 8, 10, 12)}, "no such input; it has x"),
    ({"x": (1, 8, 10)}, "has 3 axes, the model's input has 4"),
    ({"x": (1, 9, 10, 12)}, "the model fixes 8 for 9"),
])  # fmt: skip
def test_shapes_that_do_not_fit(tmp_path, given, reason):
    with pytest.raises(ConfigError, match=reason):
        decompose(conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx", shapes=given)


def test_the_written_file_is_for_the_user_s_group_too(tmp_path):
    decompose(
        save(tmp_path / "in.onnx", [node("Conv", "x w", name="c")], {"w": numbers(16, 8, 3, 3)}), tmp_path / "o.onnx"
    )
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "o.onnx").stat().st_mode & 0o777 == 0o666 & ~mask


def test_data_that_the_source_reads_are_kept_where_another_model_of_their_name_is_replaced(tmp_path, monkeypatch):
    """The source is a copy of the earlier output, so that both refer to one data file; paths are spelt differently."""
    monkeypatch.chdir(tmp_path)
    model = onnx.load(str(conv_net(tmp_path / "small.onnx")))
    onnx.save(model, "small.onnx", save_as_external_data=True, location="small.onnx.data", size_threshold=0)
    Path("model.onnx").write_bytes(Path("small.onnx").read_bytes())
    x = numbers(1, 8, 10, 12)
    wanted = answer(Path("model.onnx"), x=x)[0]
    decompose(Path("model.onnx"), tmp_path / "small.onnx", force=True)
    np.testing.assert_array_equal(answer(Path("model.onnx"), x=x)[0], wanted)
    assert len(load_graph("small.onnx").graph)
