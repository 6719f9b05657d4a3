"""hodec show of a model file: what decompose wrote into it, as text and as JSON."""

import json

import onnx
import pytest

from hodec.cli import main as cli

from small_graphs import conv_net  # isort: skip


def call(capsys, *argv):
    code = cli.main([str(one) for one in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def small(tmp_path, capsys):
    """A decomposed model, and what the verb said of it."""
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "small.onnx"
    how = ("--method", "tucker", "--ranks", "4", "--exclude", "head")
    code, text, _ = call(capsys, "decompose", source, "-o", out, *how, "--json")
    assert code == 0
    return out, json.loads(text)


def rewritten(path, text):
    """The file with another map of changes; None: without one."""
    model = onnx.load(str(path))
    del model.metadata_props[:]
    if text is not None:
        model.metadata_props.add(key="hodec.changes", value=text)
    onnx.save(model, str(path))
    return path


def test_the_map_of_changes_as_json_is_what_decompose_said(capsys, small):
    path, said = small
    code, out, err = call(capsys, "show", path, "--json")
    value = json.loads(out)
    assert (code, err) == (0, "")
    assert value["layers"] == said["changes"]
    assert value["skipped"] == said["skipped"]
    assert value["rule"] == said["rule"]


def test_the_map_of_changes_as_text_has_a_line_a_layer(capsys, small):
    path, said = small
    code, out, err = call(capsys, "show", path)
    first, *lines = out.splitlines()
    assert (code, err) == (0, "")
    assert first == "2 layers decomposed by rule manual, 1 left dense"
    error = said["changes"]["first"]["error"]
    assert lines[0] == f"  first 16·8·3·3 -> 3 nodes  tucker [4, 4], weight error {error:.3f}"
    assert lines[1].startswith("  second 16·16·3·3 -> 3 nodes  tucker [4, 4]")
    assert lines[2:] == ["  dense, excluded by 'head': head"]


def test_a_second_call_adds_to_the_map(capsys, small, tmp_path):
    path, _ = small
    how = ("--method", "svd", "--ranks", "4", "--include", "head")
    assert call(capsys, "decompose", path, "-o", tmp_path / "more.onnx", *how)[0] == 0
    code, out, _ = call(capsys, "show", tmp_path / "more.onnx", "--json")
    assert code == 0
    assert list(json.loads(out)["layers"]) == ["first", "second", "head"]


def test_files_of_version_1_are_read_and_grow_in_the_words_of_this_one(capsys, small, tmp_path):
    path, said = small
    words = {"layer_type": "kind", "resolved_execution": "runs_as"}
    layers = {name: {words.get(key, key): part for key, part in one.items()} for name, one in said["changes"].items()}
    value = {"format": "hodec-onnx-changes", "version": 1, "rule": "manual", "layers": layers, "skipped": {}}
    rewritten(path, json.dumps(value))
    assert json.loads(call(capsys, "show", path, "--json")[1])["layers"] == said["changes"]
    how = ("--method", "svd", "--ranks", "4", "--include", "head")
    assert call(capsys, "decompose", path, "-o", tmp_path / "more.onnx", *how)[0] == 0
    layers = json.loads(call(capsys, "show", tmp_path / "more.onnx", "--json")[1])["layers"]
    assert list(layers) == ["first", "second", "head"]
    assert all({"layer_type", "resolved_execution"} <= one.keys() for one in layers.values())


@pytest.mark.parametrize(("text", "reason"), [
    (None, "small.onnx holds no map of changes (metadata 'hodec.changes'): hodec decompose did not write it"),
    ("{", "is no JSON"),
    ("[]", "is list; this hodec reads ['hodec-onnx-changes', 2]"),
    ('{"format": "hodec-onnx-changes", "version": 3}', "is ['hodec-onnx-changes', 3]; this hodec reads"),
    ('{"format": "hodec-onnx-changes", "version": 1}', "lacks a field or was altered"),
    ('{"format": "hodec-onnx-changes", "version": 1, "rule": "r", "skipped": {}, "layers": {"a": {"nodes": 1}}}',
     "lacks a field or was altered"),
])  # fmt: skip
def test_a_file_without_a_readable_map_is_one_line(capsys, small, text, reason):
    path = rewritten(small[0], text)
    code, out, err = call(capsys, "show", path)
    assert (code, out) == (2, "")
    assert err.startswith("hodec show: ")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"no model"])
def test_no_model_file_is_one_line(capsys, tmp_path, content):
    if content is not None:
        (tmp_path / "a.onnx").write_bytes(content)
    code, out, err = call(capsys, "show", tmp_path / "a.onnx")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
