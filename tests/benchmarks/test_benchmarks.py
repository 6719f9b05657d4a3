"""The benchmarks run, write what they found and refuse what is not there; no test here asserts a time."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for name in THREADS:  # so that what a run sets ends with the test
        monkeypatch.setenv(name, "1")


@pytest.fixture
def settings(tmp_path):
    from benchmarks.machine import Ceilings
    from benchmarks.settings import Settings

    return Settings(Ceilings(1e11, 1e11, 1e11, 1e10), tmp_path, quick=True)


def row(**changes):
    from benchmarks.rows import Row, Target

    return replace(Row("group", "what", "peer", 1.0, 6.0, figure=6.0, target=Target(">=", 5)), **changes)


def run(*argv):
    return import_module("benchmarks.__main__").main(list(argv))


def test_a_run_writes_rows_as_json_and_as_a_page(tmp_path, capsys):
    assert run("--quick", "--only", "decompose", "--channels", "16", "--out", str(tmp_path / "new")) == 0
    found = json.loads((tmp_path / "new" / "benchmarks.json").read_text())
    assert {"date", "processor", "threads", "torch", "tensorly", "onnxruntime"} <= set(found["facts"])
    assert {one["peer"] for one in found["rows"]} >= {"tensorly tensor_train", "tensorly partial_tucker"}
    assert len(found["rows"]) == 7
    for one in found["rows"]:
        assert one["ours"] > 0
        assert one["figure"] == pytest.approx(one["theirs"] / one["ours"])
        assert one["error"] < 1.001  # the same approximation, whoever makes it
    judged = [one for one in found["rows"] if one["target"]]
    assert {one["met"] for one in judged} <= {"yes", "no"}
    page = (tmp_path / "new" / "benchmarks.md").read_text()
    assert all(f"| {one['what']} | {one['peer']} |" in page for one in found["rows"])
    assert "Measured ceilings" in page
    assert "| tensor train of 16x16x3x3" in capsys.readouterr().out


def test_an_unknown_name_is_refused_in_one_line_that_lists_the_names(tmp_path, capsys):
    assert run("--only", "decompose", "decomposed", "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "there is no decomposed;" in said
    assert all(name in said for name in import_module("benchmarks.__main__").GROUPS)
    assert not list(tmp_path.iterdir())


def test_every_group_has_rows_and_says_what_it_measures():
    for module in map(import_module, import_module("benchmarks.__main__").GROUPS.values()):
        assert callable(module.rows)
        assert module.__doc__


def test_a_missing_peer_is_a_row(settings, monkeypatch):
    from benchmarks import files, fused

    monkeypatch.setattr(files, "not_installed", lambda *names: "onnx is not installed")
    (found,) = files.rows(settings)
    assert (found.met, found.note) == ("-", "not measured: onnx is not installed")

    monkeypatch.setattr(fused, "SETTINGS", {"tltorch": fused.tltorch})
    monkeypatch.setattr(fused, "not_installed", lambda *names: f"{names[0]} is not installed")
    monkeypatch.setattr(fused.hodec, "fuse", lambda net, example_input: net)
    (found,) = fused.rows(settings)
    assert found.note == "not measured: tltorch is not installed"
    assert "| not measured |" in import_module("benchmarks.page").line(found)


def test_absent_packages_are_named():
    from benchmarks.settings import not_installed

    assert not_installed("json") == ""
    assert not_installed("json", "no_such_package") == "no_such_package is not installed"
    assert not_installed("no_such", "nor_such") == "no_such, nor_such are not installed"


def test_what_counts_as_met():
    from benchmarks.rows import Target

    assert row().met == "yes"
    assert row(figure=4.9).met == "no"
    assert row(error=1.0009).met == "yes"
    assert row(error=1.0011).met == "no"
    assert row(error=1.0009, allowed_error=1.0001).met == "no"
    assert row(target=None).met == "-"
    assert row(figure=None).met == "-"
    assert row(figure=0.02, target=Target("<=", 0.03, "%")).met == "yes"
    assert str(Target("<=", 0.03, "%")) == "<= 3 %"
    assert str(Target("<=", 2 * 2**30, "B")) == "<= 2048 MiB"


def test_a_page_explains_each_miss(settings):
    from benchmarks.page import page

    rows = [row(), row(what="slow", figure=2.0, limit="at least 1 s"), row(what="wrong", error=1.5)]
    told = {"facts": {"processor": "one"}, "verdict": "Quiet.", "plots": {"group.png": "A plot"}, "quick": True}
    text = page(rows, **told, texts={"group": "What it is."}, ceilings=settings.ceilings)
    assert "1 of 3 targets are met. Quiet." in text
    assert "- slow beside peer: 2.00x, wanted >= 5x; at least 1 s" in text
    assert "the error is 1.5000 times the peer's" in text
    assert "![A plot](group.png)" in text


def test_spread_is_half_the_interquartile_range_over_the_median():
    from benchmarks.timing import Times

    times = Times({"a": (2.0, 4.0, 6.0, 8.0, 10.0), "b": (2.0,) * 5})
    assert times.ratio("a", "b") == 3
    assert times.spread("a", "b") == pytest.approx(1 / 3)
    assert Times({"a": (1.0,), "b": (1.0,)}).spread("a", "b") is None


def test_in_turns_times_every_work_in_every_round():
    from benchmarks.timing import in_turns

    times = in_turns({"a": lambda: sum(range(100)), "b": lambda: None}, seconds=0, rounds=(3, 5))
    assert {name: len(samples) for name, samples in times.samples.items()} == {"a": 3, "b": 3}


def test_the_gauge_says_when_the_machine_is_not_quiet(monkeypatch):
    from benchmarks import machine

    busy = iter([100.0, 100.0 + 1e9, None])
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    gauge = machine.Gauge()
    assert "100% of the machine's CPU" in (said := gauge.verdict())
    assert "NOT from a quiet machine" in said
    assert "unknown" in gauge.verdict()


@pytest.mark.slow  # a process that imports all of torch
def test_a_child_reports_memory():
    from benchmarks import child

    done = child.in_child("benchmarks.big:make_only", shape=[64, 64, 3, 3])
    assert not done.problem
    assert done.value == 64 * 64 * 9
    assert 0 < done.before <= done.peak


def test_a_child_that_fails_is_a_reason(monkeypatch):
    from benchmarks import child

    monkeypatch.setattr(child.sys, "executable", shutil.which("false"))
    assert child.in_child("benchmarks.big:make_only", shape=[64]).problem == "the process ended with 1 (no message)"


def test_the_published_chain_is_a_convolution_with_its_dense_weight():
    from benchmarks.kernels import half_ranks
    from benchmarks.published_chain import PublishedChain

    conv = nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False).double()
    modes, ranks = half_ranks(tuple(conv.weight.shape))
    chain = PublishedChain(conv, ranks, modes).double()
    conv.weight.data = chain.dense_weight().detach()
    x = torch.randn(2, 12, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(chain(x), conv(x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")  # of the other library's own
def test_both_cps_are_sums_of_the_products_that_are_measured():
    pytest.importorskip("tensorly")
    from benchmarks.cp import by_hodec, by_tensorly
    from benchmarks.kernels import kernel

    weight = kernel(8, 6, 3)
    for way in (by_hodec, by_tensorly):
        fit = way(weight, 5)
        assert all(factor.shape[1] == 5 for factor in fit.factors)
        whole = torch.einsum("or,ir,hr,wr->oihw", *fit.factors)
        torch.testing.assert_close(fit.whole, whole, rtol=1e-4, atol=1e-4)
        norms = [torch.einsum("o,i,h,w->oihw", *(f[:, r] for f in fit.factors)).norm() for r in range(5)]
        assert fit.size(weight) == pytest.approx(float(torch.stack(norms).norm() / weight.norm()), rel=1e-4)


def test_kept_bytes_are_those_of_one_image_more():
    from benchmarks.training import kept_bytes

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 2))
    kept = kept_bytes(net, torch.randn(4, 3, 4, 4))
    assert kept == 4 * (3 * 16 + 8 * 16 + 2)  # inputs of the two layers, and of the squares summed by the measurement


def test_the_scaling_model_is_found_again_in_its_own_seconds(settings):
    from benchmarks import scaling

    wanted = scaling.Model((1e-11, 3e-11, 1e-10, 1e-4), 0, 0)
    points = [point for points in scaling.SWEEPS.values() for point in points]
    found = scaling.fit({point: wanted.seconds(point) for point in points})
    assert found.coefficients == pytest.approx(wanted.coefficients, rel=1e-5)
    assert found.worst_error < 1e-6
    scaling.draw(settings.out / "plot.png", scaling.SWEEPS, {p: wanted.seconds(p) for p in points}, found)
    assert (settings.out / "plot.png").read_bytes()[1:4] == b"PNG"
    first = next(iter(scaling.predictions(found)))
    assert first.theirs == pytest.approx(scaling.LAYERS * wanted.seconds(scaling.Point(channels=256)))


def test_work_is_counted_as_by_hand():
    from benchmarks import work

    assert work.product(2, 3, 5).products == 2 * 2 * 3 * 5
    assert work.product(2, 3, 5).nbytes == 4 * (6 + 15 + 10)
    wide, tall = work.truncation(4, 100, 2), work.truncation(100, 4, 2)
    assert wide == tall
    assert wide.products == 4 * 4 * 100 + 2 * 2 * 4 * 100
    assert work.tensor_train((4, 100), (2,)) == wide
    assert work.rebuilt_train((4, 100), (2,)) == work.product(4, 2, 100)
