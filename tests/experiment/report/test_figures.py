"""The figures show the numbers of the run, come out the same every time, and say why when they cannot."""

import math
import re
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from hodec.experiment.report import figures, style
from hodec.experiment.report.collect import collect, collect_sweep

from report_edits import edit  # isort: skip

DRAW = {spec.name: spec.draw for spec in (*figures.CURVES, *figures.COSTS)}
OF_ADMM = ("approximation-error", "dual-residual", "penalty", "pull")


@pytest.fixture(scope="module")
def run(finished):
    return collect(finished)


def line_named(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


@pytest.mark.parametrize(("name", "key"), list(zip(OF_ADMM, ("primal_residual", "dual_residual", "rho", "pull"))))
def test_curves_of_admm_have_a_line_for_each_layer_and_for_all_together(name, key, run):
    (axes,) = DRAW[name](run).axes
    assert len(axes.lines) == len(run.plan) + 1
    total = line_named(axes, "mean" if key in ("rho", "pull") else "all layers together")
    np.testing.assert_allclose(total.get_ydata(), [row.values[f"admm/{key}"] for row in run.phase("admm")])
    np.testing.assert_array_equal(total.get_xdata(), [1, 2])
    assert total.get_linewidth() > 2 * axes.lines[0].get_linewidth()


def test_each_layer_is_named_where_they_are_few(run):
    (legend,) = DRAW["approximation-error"](run).legends
    assert {text.get_text() for text in legend.get_texts()} >= run.phase("admm")[-1].layers.keys()


def test_a_wide_range_of_values_is_drawn_logarithmically(folder):
    def decay(rows):
        rows[0]["admm/primal_residual"], rows[1]["admm/primal_residual"] = 0.5, 0.001

    (axes,) = DRAW["approximation-error"](collect(edit(folder / "metrics.jsonl", decay))).axes
    assert axes.get_yscale() == "log"


def test_training_curves_lay_the_phases_end_to_end(run):
    (axes,) = DRAW["accuracy"](run).axes
    assert sorted({line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("valid")}) == [1]
    assert sorted(
        {int(x) for line in axes.lines for x in line.get_xdata() if len(line.get_xdata()) == 2 and x > 0.6}
    ) >= [1, 2, 3, 4]
    assert [text.get_text() for text in axes.texts] == ["ADMM training", "retraining"]
    truncated = line_named(axes, "validation, if truncated now")
    expected = [100 * row.values["admm/truncated_accuracy"] for row in run.phase("admm")]
    np.testing.assert_allclose(truncated.get_ydata(), expected)
    assert truncated.get_linestyle() == "--"


@pytest.mark.parametrize(("name", "cost"), [("parameters", "params"), ("macs", "macs")])
def test_layer_costs_show_before_and_after_of_each_layer(name, cost, run):
    (axes,) = DRAW[name](run).axes
    widths = [bar.get_width() for bar in axes.patches]
    layers = run.plan.values()
    assert widths == [getattr(layer, f"{cost}_{when}") for when in ("before", "after") for layer in layers]
    last = list(layers)[-1]
    before, after = getattr(last, f"{cost}_before"), getattr(last, f"{cost}_after")
    assert axes.texts[-1].get_text() == f"{100 * (after / before - 1):+.1f} %".replace("+0.0", "0.0")


def test_spectra_show_what_each_rank_keeps_of_what_there_is(run):
    (axes,) = DRAW["spectra"](run).axes
    assert [text.get_text() for text in axes.texts] == list(run.plan)
    spectra = [one for name in run.plan for one in run.spectra[name]]
    tints = [patch for patch in axes.patches if patch.get_alpha() is not None]
    assert [tint.get_width() for tint in tints] == [one.rank / one.full for one in spectra]
    kept = [line for line in axes.lines if line.get_color() == style.INKS["blue"]]
    cut_off = [line for line in axes.lines if line.get_color() == style.INKS["orange"]]
    assert [len(line.get_xdata()) for line in kept] == [sum(at <= one.rank for at in one.at) for one in spectra]
    assert len(cut_off) == sum(one.rank < one.full for one in spectra) > 0
    heights = kept[0].get_ydata()
    assert list(heights) == sorted(heights, reverse=True)
    assert heights[0] == 1, "the largest stands at the top"


def test_a_run_without_spectra_says_so(copied, tmp_path):
    with pytest.raises(figures.NothingToDraw, match=r"no spectra\.json"):
        DRAW["spectra"](collect(copied(tmp_path / "run", leave_out=("spectra.json",))))


def test_only_the_largest_of_very_many_layers_are_drawn_and_it_is_said(folder):
    def many(plan):
        small, large = plan["layers"]["layer1.0.conv1"], plan["layers"]["layer3.0.conv2"]
        plan["layers"] = {f"block{at}": small for at in range(70)} | {"large": large}

    (axes,) = DRAW["parameters"](collect(edit(folder / "plan.json", many))).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert (len(names), names[0], names[-1]) == (60, "block0", "large")
    assert "11 not shown" in axes.get_title(loc="left")


def of_sweep(folder, name):
    """The axes and the legend's texts of a figure of a sweep."""
    figure = dict(figures.SWEEP)[name](collect_sweep(folder))
    (axes,), (legend,) = figure.axes, figure.legends
    return axes, [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("name", ["sweep-loss", "sweep-error", "sweep-accuracy"])
def test_a_figure_of_a_sweep_has_a_line_per_run_and_names_it(sweep, name):
    axes, names = of_sweep(sweep, name)
    both = ["-"] * 4 + ["--"] * 4 * (name == "sweep-accuracy")
    assert sorted(line.get_linestyle() for line in axes.lines) == both
    assert names == [f"admm.rho={rho}" for rho in ("0.001", "0.01", "0.1", "1")]


def test_a_control_without_admm_stands_in_the_sweep(copied, tmp_path):
    copied(tmp_path / "0")

    def control(rows):
        for row in rows:
            row["phase"] = {"admm": "dense"}.get(row["phase"], row["phase"])
            for key in [key for key in row if key.startswith("admm/")]:
                del row[key]

    edit(copied(tmp_path / "1") / "metrics.jsonl", control)
    assert [len(of_sweep(tmp_path, name)[0].lines) for name in ("sweep-loss", "sweep-error")] == [2, 1]


def test_tradeoff_needs_two_different_cuts_and_names_every_finished_run(sweep):
    with pytest.raises(figures.NothingToDraw, match="Fewer than two"):
        figures.tradeoff(collect_sweep(sweep))
    edit(sweep / "0" / "metrics.json", lambda results: results["reduction"].update(macs=0.5))
    (axes,) = figures.tradeoff(collect_sweep(sweep)).axes
    front, first, *_ = axes.lines
    assert first.get_xydata()[0].tolist() == [50.0, 97.0], "validation, not test"
    assert [y for _, y in front.get_xydata().tolist()] == [98.0], "the one that cuts more and scores more"
    assert [text.get_text() for text in axes.texts] == [f"admm.rho={rho}" for rho in ("0.001", "0.01", "0.1")]


def test_a_figure_without_its_numbers_says_what_is_missing(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    said = {}
    for name, draw in DRAW.items():
        with pytest.raises(figures.NothingToDraw) as reason:
            draw(collect(tmp_path))
        said[name] = str(reason.value)
    assert all("no epoch of phase admm" in said[name] for name in OF_ADMM)
    assert "no epoch with a loss" in said["loss"]
    assert "no factorized layer" in said["macs"]


def test_svg_is_the_same_on_every_call_and_in_any_caller_style(run):
    draw = DRAW["penalty"]
    before = dict(matplotlib.rcParams)
    figure = draw(run)
    first = style.to_svg(figure)
    assert style.to_svg(figure) == first
    assert dict(matplotlib.rcParams) == before  # the settings of the caller are left alone
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": None}):
        assert style.to_svg(draw(run)) == first
    ElementTree.fromstring(first)
    assert "<dc:date>" not in first
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_save_writes_both_files_and_nothing_else(run, tmp_path):
    figure = DRAW["penalty"](run)
    style.save(tmp_path / "new" / "costs.v2", figure, style.to_svg(figure))
    png = (tmp_path / "new" / "costs.v2.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 160 * figures.WIDTH, "sharp on paper and on any screen"
    assert (tmp_path / "new" / "costs.v2.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_inline_svg_refers_only_to_itself_and_to_the_colours_of_the_page(run):
    text = style.inlined(style.to_svg(DRAW["penalty"](run)), "one", 'a "quoted" <text>')
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    assert all(name.startswith("one-") for name in ids)
    references = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert references
    assert set(references) <= ids
    assert "http" not in text
    assert 'aria-label="a &quot;quoted&quot; &lt;text&gt;"' in text
    assert "var(--ink)" in text
    assert "var(--paper)" in text


def test_every_colour_of_the_figures_is_one_that_a_page_can_change():
    light, dark = (style.TEMPLATES / "report.css").read_text().split("@media")[:2]
    used = set(re.findall(r": ([0-9a-f]{6})\b", style.STYLE.read_text()))
    assert used
    assert {f"#{color}" for color in used} <= set(style.INKS.values())
    assert all(f"--{ink}: #" in dark for ink in style.INKS)


STRANGE = "_orig_mod.conv$1$<b>&"


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
def test_strange_numbers_and_names_draw_without_a_warning(change, folder):
    def strange(rows):
        del rows[2:]
        for row in rows:
            layer = next(iter(row["admm/layers"].values()))
            change(row, layer)
            row["admm/layers"] = {STRANGE: layer}

    run = collect(edit(folder / "metrics.jsonl", strange))
    for name in ("approximation-error", "penalty", "loss"):
        text = style.to_svg(DRAW[name](run))
        assert name == "loss" or "_orig_mod.conv$1$&lt;b&gt;&amp;" in text


def test_long_names_keep_both_ends():
    name = "encoder.layers.11.attention.output.dense.weight"
    short = style.shorten(name, 20)
    assert (len(short), short[:9], short[-9:]) == (20, "encoder.l", "se.weight")
    assert style.shorten("conv1", 20) == "conv1"


def test_the_front_holds_what_no_other_run_beats_in_both():
    points = [(10.0, 90.0), (20.0, 80.0), (15.0, 70.0), (30.0, 60.0), (30.0, 50.0), (5.0, 90.0)]
    assert figures.pareto(points) == [(10.0, 90.0), (20.0, 80.0), (30.0, 60.0)]
