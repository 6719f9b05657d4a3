"""hodec compress at the shell: options, exit codes, JSON."""

import json

import numpy as np
import pytest

from small_graphs import answer  # isort: skip
from calls import call  # isort: skip


pytestmark = pytest.mark.usefixtures("quick_bench")


def test_a_file_and_data_in_a_smaller_file_and_a_verdict_out(capsys, tmp_path, source, data):
    out = tmp_path / "out.onnx"
    code, text, err = call(
        capsys,
        "compress",
        source,
        "--data",
        data,
        "-o",
        out,
        "--max-drop",
        "15%",
        "--loss",
        "error",
        "--target",
        "macs",
    )
    assert (code, err) == (0, "")
    first = text.splitlines()[0]
    assert first.startswith("keeps ")
    assert f"{out.stat().st_size / source.stat().st_size:.2f} of the size" in first
    assert "fitted to 32 samples, judged by 16 that were held out" in text
    answer(out, x=np.zeros((2, 8, 10, 12), np.float32))


def test_json_has_the_figures(capsys, tmp_path, source, data):
    out = tmp_path / "out.onnx"
    score = tmp_path / "score.py"
    score.write_text(
        "import numpy as np\nX = np.load(__file__.replace('score.py', 'calib.npz'))['x']\n"
        "def mean(run):\n    return float(np.abs(run({'x': X})['y']).mean())\n"
    )
    code, text, _ = call(
        capsys, "compress", source, "--data", data, "-o", out, "--eval", f"{score}:mean", "--max-drop", "20%", "--json",
        "--target", "size", "--methods", "svd", "--round-to", "2", "--exclude", "head",
    )  # fmt: skip
    value = json.loads(text)
    assert code == 0
    assert value["judge"] == "score of --eval"
    assert value["score"][1] >= 0.8 * value["score"][0]
    assert value["bytes"] == [source.stat().st_size, out.stat().st_size]
    assert {one["method"] for one in value["changes"].values()} == {"svd"}
    assert all(rank % 2 == 0 for one in value["changes"].values() for rank in one["ranks"])
    assert "head" in value["skipped"]


def test_exit_code_3_where_nothing_pays(capsys, tmp_path, source, data):
    noise = np.random.default_rng(0).standard_normal((48, 8, 10, 12)).astype(np.float32)
    np.savez(data, x=noise)
    code, text, err = call(
        capsys, "compress", source, "--data", data, "-o", tmp_path / "out.onnx", "--max-drop", "0", "--loss", "error"
    )
    assert (code, text) == (3, "")
    assert err.startswith("hodec compress: nothing pays")
    assert err.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(("flags", "words"), [
    ([], "--data: missing"),
    (["--data", "nowhere"], "nowhere does not exist"),
    (["--data", "{data}", "--mean", "a"], "--mean: 'a' given"),
    (["--data", "{data}", "--std", "0"], "--std: 0 given"),
    (["--data", "{data}", "--channels", "rbg"], "--channels: 'rbg' given; allowed: rgb | bgr"),
    (["--data", "{data}", "--round-to", "0"], "--round-to: '0' given"),
    (["--data", "{data}", "--methods", "svd,qr"], "--methods: 'qr' given"),
    (["--data", "{data}", "--eval", "nowhere.py:f"], "nowhere.py does not exist"),
    (["--data", "{data}", "--max-drop", "x"], "--max-drop: 'x' given"),
])  # fmt: skip
def test_one_line_and_exit_code_2(capsys, tmp_path, source, data, flags, words):
    given = [flag.format(data=data) for flag in flags]
    code, text, err = call(capsys, "compress", source, "-o", tmp_path / "out.onnx", *given)
    assert (code, text) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()


def test_the_report_is_one_page_with_the_figures(capsys, tmp_path, source, data):
    out, page = tmp_path / "out.onnx", tmp_path / "small.html"
    how = ["--max-drop", "20%", "--loss", "error", "--target", "macs", "--report", page]
    code, text, _ = call(capsys, "compress", source, "--data", data, "-o", out, *how)
    assert code == 0
    html = page.read_text()
    assert text.splitlines()[0] in html
    assert html.count("<svg") == 2
    assert "http" not in html
    assert all(f"<td>{name}</td>" in html for name in ("first", "second", "head"))


def test_a_curve_shows_what_is_kept_at_several_costs(capsys, tmp_path, source, data):
    page = tmp_path / "curve.html"
    code, text, err = call(capsys, "plan", source, "--data", data, "--loss", "error", "--curve", page, "--json")
    assert (code, err) == (0, "")
    points = json.loads(text)["points"]
    assert len(points) > 3
    assert all(one["macs"] <= one["share"] + 1e-6 for one in points)
    assert points[0]["score"] > points[-1]["score"]
    assert page.read_text().count("<circle") == 2 * (len(points) + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.npz", "curve.html", "in.onnx"]


@pytest.mark.parametrize(("flags", "words"), [
    (["--curve", "c.html"], "--curve and --data: allowed together"),
    (["--data", "{data}"], "--curve and --data: allowed together"),
    (["--data", "{data}", "--curve", "nowhere/c.html"], "--curve: folder nowhere does not exist"),
    (["--data", "{data}", "--curve", "c.html", "--macs", "0.5"], "--macs: given with --curve"),
    (["--data", "{data}", "--curve", "c.html", "--dequantize"], "--dequantize: given with --curve"),
    (["--data", "{data}", "--curve", "c.html", "--force"], "--force: given with --curve"),
    (["--mean", "0"], "--mean: given without data, of which it speaks"),
])  # fmt: skip
def test_a_curve_that_cannot_be_drawn(capsys, source, data, flags, words):
    code, _, err = call(capsys, "plan", source, *[flag.format(data=data) for flag in flags])
    assert code == 2
    assert words in err


COMPRESS, DECOMPOSE = ("compress", "--force"), ("decompose", "--no-data", "--force")


@pytest.mark.parametrize(("verb", "flag", "name"), [
    (COMPRESS, "--report", "in.onnx"), (COMPRESS, "--report", "out.onnx"), (COMPRESS, "--report", "calib.npz"),
    (COMPRESS, "-o", "calib.npz"), (("plan",), "--curve", "in.onnx"), (("plan",), "--curve", "calib.npz"),
    (("plan", "--force"), "-o", "in.onnx"), (DECOMPOSE, "--plan-out", "in.onnx"), (DECOMPOSE, "--plan-out", "out.onnx"),
])  # fmt: skip
def test_no_page_or_plan_replaces_what_else_is_read_or_written(capsys, tmp_path, source, data, verb, flag, name):
    other = tmp_path / "folder" / ".." / name  # spelt in another way
    (tmp_path / "folder").mkdir()
    with_data = ["--data", data] if verb == COMPRESS or flag == "--curve" else []
    out = ["-o", tmp_path / "out.onnx"] if verb[0] != "plan" and flag != "-o" else []
    before = [path.read_bytes() for path in (source, data)]
    code, text, err = call(capsys, *verb, source, *with_data, *out, flag, other)
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert f"{name} is one of the models or of the other files given; name another file" in err
    assert [path.read_bytes() for path in (source, data)] == before
