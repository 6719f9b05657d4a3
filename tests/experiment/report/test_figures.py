"""The figures show the numbers of the run, come out the same every time, and say why when they cannot."""

import math
import re
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from hodec.experiment.report import figures
from hodec.experiment.report.canvas import inline_svg, shorten
from hodec.experiment.report.collect import collect, collect_sweep


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory):
    return collect(run_folder(tmp_path_factory.mktemp("figures") / "run"))


def line_named(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def test_approximation_error_draws_all_layers_and_the_whole(run):
    (axes,) = figures.approximation_error(run).axes
    assert axes.get_yscale() == "log"
    assert len(axes.lines) == len(run.plan.layers) + 1
    whole = line_named(axes, "all layers together")
    expected = [row.values["admm/primal_residual"] for row in run.phase("admm")]
    np.testing.assert_allclose(whole.get_ydata(), expected)
    np.testing.assert_array_equal(whole.get_xdata(), np.arange(1, 25))
    assert whole.get_linewidth() > 2 * axes.lines[0].get_linewidth()


def test_the_worst_layer_is_named(run):
    (axes,) = figures.approximation_error(run).axes
    last = run.phase("admm")[-1].layers
    worst = max(last, key=lambda name: last[name]["primal_residual"])
    assert any(text.get_text().startswith(worst) for text in axes.texts)


def test_dual_and_rho_has_a_panel_for_each(run):
    titles = [axes.get_title(loc="left") for axes in figures.dual_and_rho(run).axes]
    assert titles == ["Dual residual", "Penalty rho"]


def test_training_curves_lay_the_phases_end_to_end(run):
    loss, accuracy = figures.training_curves(run).axes
    firsts = [line.get_xdata()[0] for line in accuracy.lines if len(line.get_xdata()) > 2]
    assert sorted(set(firsts)) == [1, 13, 37]
    assert [text.get_text() for text in loss.texts] == ["pretraining", "ADMM training", "retraining"]
    truncated = line_named(accuracy, "validation, if truncated now")
    expected = [100 * row.values["admm/truncated_accuracy"] for row in run.phase("admm")]
    np.testing.assert_allclose(truncated.get_ydata(), expected)
    assert truncated.get_linestyle() == "--"


def test_layer_costs_show_before_and_after_of_each_layer(run):
    params, macs = figures.layer_costs(run).axes
    widths = [bar.get_width() for bar in params.patches]
    layers = run.plan.layers
    assert widths == [layer.params_before for layer in layers] + [layer.params_after for layer in layers]
    assert [text.get_text() for text in macs.texts][-1] == "-83.3 %"


def test_only_the_largest_of_very_many_layers_are_drawn_and_it_is_said(files_in, tmp_path):
    layers = {f"block{at}": {"params_before": 100 + at, "params_after": 10} for at in range(75)}
    figure = figures.layer_costs(collect(files_in(tmp_path, plan={"format": "hodec-plan", "layers": layers})))
    (axes,) = figure.axes
    assert len(axes.get_yticks()) == figures.MOST_BARS
    assert axes.get_yticklabels()[0].get_text() == "block15"
    assert "15 not shown" in axes.get_title(loc="left")


def test_sweep_has_three_panels_and_a_line_per_run(sweep_folder):
    figure = figures.sweep(collect_sweep(sweep_folder))
    loss, error, accuracy = figure.axes
    assert len(loss.lines) == len(error.lines) == 4
    assert sorted(line.get_linestyle() for line in accuracy.lines) == ["-"] * 4 + ["--"] * 4
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"admm.rho={rho}" for rho in ("0.001", "0.01", "0.1", "1")
    ]


def test_a_control_without_admm_stands_in_the_sweep(run_folder, files_in, tmp_path):
    run_folder(tmp_path / "0", phases={"admm": 3})
    rows = [{"phase": "dense", "epoch": epoch, "train/loss": 1.0 - 0.1 * epoch} for epoch in range(3)]
    files_in(tmp_path / "1", config={"admm": {"enabled": False}}, rows=rows)
    loss, error, _ = figures.sweep(collect_sweep(tmp_path)).axes
    assert (len(loss.lines), len(error.lines)) == (2, 1)


def test_tradeoff_needs_two_different_cuts(sweep_folder):
    with pytest.raises(figures.NothingToDraw, match="Fewer than two"):
        figures.tradeoff(collect_sweep(sweep_folder))


def test_tradeoff_names_every_finished_run(files_in, tmp_path):
    for at, macs in enumerate((50, 20)):
        outcome = {"dense": {"macs": 100}, "compressed": {"macs": macs, "test_accuracy": 0.9 + at / 100}}
        files_in(tmp_path / str(at), config={"tt_ranks": 8 + at}, outcome=outcome)
    (axes,) = figures.tradeoff(collect_sweep(tmp_path)).axes
    assert [line.get_xydata()[0].tolist() for line in axes.lines] == [[50.0, 90.0], [80.0, 91.0]]
    assert [text.get_text() for text in axes.texts] == ["tt_ranks=8", "tt_ranks=9"]


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (figures.approximation_error, "no epoch of phase admm"),
        (figures.dual_and_rho, "no epoch of phase admm"),
        (figures.training_curves, "no epoch with a loss"),
        (figures.layer_costs, "no factorized layer"),
    ],
)
def test_a_figure_without_its_numbers_says_what_is_missing(draw, said, files_in, tmp_path):
    with pytest.raises(figures.NothingToDraw, match=said):
        draw(collect(files_in(tmp_path, config={})))


def test_svg_is_the_same_on_every_call_and_in_any_caller_style(run):
    figure = figures.approximation_error(run)
    first = figures.to_svg(figure)
    assert figures.to_svg(figure) == first
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": None}):
        assert figures.to_svg(figures.approximation_error(run)) == first
    ElementTree.fromstring(first)
    assert "<dc:date>" not in first


def test_drawing_leaves_the_settings_of_the_caller_alone(run):
    before = dict(matplotlib.rcParams)
    figures.layer_costs(run)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_save_writes_both_files_and_nothing_else(run, tmp_path):
    png, svg = figures.save(figures.layer_costs(run), tmp_path / "new" / "costs.v2.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text(encoding="utf-8").startswith("<?xml")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["costs.v2.png", "costs.v2.svg"]


def test_inline_svg_refers_only_to_itself_and_to_the_colours_of_the_page(run):
    text = inline_svg(figures.approximation_error(run), "one", 'a "quoted" <text>')
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    assert all(name.startswith("one-") for name in ids)
    references = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert references
    assert set(references) <= ids
    assert "http" not in text
    assert 'aria-label="a &quot;quoted&quot; &lt;text&gt;"' in text
    assert "var(--ink)" in text


STRANGE = "_orig_mod.conv$1$<b>&"


def strange_rows(change):
    rows = []
    for epoch in range(3):
        layer = {"rho": 0.1, "primal_residual": 0.5 / (epoch + 1), "dual_residual": 0.1}
        row = {"phase": "admm", "epoch": epoch, "train/loss": 1.0, "admm/primal_residual": 0.5, "admm/rho": 0.1}
        change(row, layer)
        rows.append(row | {"admm/layers": {STRANGE: layer}})
    return rows


def _zero(row, layer):
    row["admm/primal_residual"] = row["admm/rho"] = layer["primal_residual"] = layer["dual_residual"] = 0.0


def _broken(row, layer):
    row["train/loss"] = row["admm/primal_residual"] = math.nan
    layer["primal_residual"] = layer["rho"] = math.inf


def _huge(row, layer):
    row["train/loss"] = 1e300
    layer["primal_residual"] = 1e-300 if row["epoch"] else 1e200


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", [_zero, _broken, _huge], ids=["zero", "broken", "huge"])
@pytest.mark.parametrize("draw", [figures.approximation_error, figures.dual_and_rho, figures.training_curves])
def test_strange_numbers_and_names_draw_without_a_warning(draw, change, files_in, tmp_path):
    figure = draw(collect(files_in(tmp_path, rows=strange_rows(change))))
    text = figures.to_svg(figure)
    if draw is not figures.training_curves:
        assert "_orig_mod.conv$1$&lt;b&gt;&amp;" in text


def test_long_names_keep_both_ends():
    name = "encoder.layers.11.attention.output.dense.weight"
    short = shorten(name, 20)
    assert len(short) == 20
    assert short.startswith("encoder.l")
    assert short.endswith("se.weight")
    assert shorten("conv1", 20) == "conv1"
