"""The written reports: complete, offline, escaped, whole."""

import hashlib
import json
import random
import re
import shutil
from base64 import b64encode
from html import unescape

import pytest
import torch
import yaml

from hodec.errors import CheckpointError
from hodec.experiment.report import render, words
from hodec.experiment.report.collect import collect
from hodec.experiment.report.figures import COSTS, CURVES
from hodec.experiment.report.render import draw, draw_all, render_html, render_markdown, write_report
from hodec.experiment.results import spectra
from hodec.models import build_model
from hodec.ranks import make_plan
from hodec.text_table import accuracy

from report_edits import edit  # isort: skip
from report_page import Page  # isort: skip


@pytest.fixture(scope="module")
def run(finished):
    return collect(finished)


@pytest.fixture(scope="module")
def drawn(run):
    return draw_all(run)


@pytest.fixture(scope="module")
def html(run, drawn):
    return render_html(run, drawn)


def read(folder):
    """The report in Markdown, without figures: its text is that of the HTML page."""
    return render_markdown(collect(folder), []).replace("\u00a0", " ").replace("\\", "")


def results_of(**networks):
    """A change of metrics.json: ``results_of(compressed={"test_accuracy": 0.9})``."""

    def change(results):
        for name, values in networks.items():
            results.setdefault(name, dict(results["dense"])).update(values)

    return change


def test_the_headline_says_what_was_won_and_lost(folder):
    change = results_of(dense={"test_accuracy": 0.972}, compressed={"test_accuracy": 0.969})
    run = collect(edit(folder / "metrics.json", change))
    cut = run.plan.reduction
    assert words.headline(run) == (
        f"resnet8 on fake: {cut['params']:.1%} fewer parameters, {cut['macs']:.1%} fewer MACs; "
        "test accuracy 97.20 % dense → 96.90 % compressed"
    ).replace("% fewer", " % fewer")


def test_latency_stands_in_the_headline_and_in_the_table(folder):
    assert "latency" not in read(folder).split("##")[0].replace("| latency | ratio |", "")
    change = results_of(dense={"latency_ms": 3.0}, compressed={"latency_ms": 1.5})
    edit(folder / "metrics.json", change)
    edit(folder / "metrics.json", lambda results: results.update(latency={"batch": 1, "device": "EPYC, 2 threads"}))
    text = read(folder)
    assert "MACs, 2 x lower latency; test accuracy" in text.splitlines()[0]
    assert re.search(r"\| dense \|.* 3 ms \|  \|\n", text)
    assert re.search(r"\| compressed \|.* 1.5 ms \| 2 x \|\n", text)
    assert "batch 1, device EPYC, 2 threads; its" in text
    assert '<td class="num">2 x</td>' in render_html(collect(folder), [])
    edit(folder / "metrics.json", results_of(compressed={"latency_ms": 4.5}))
    assert "1.5 x higher latency" in words.headline(collect(folder))


def test_what_admm_cost_the_dense_net_is_not_left_out(folder):
    """Beside a dense net that ADMM has held back alone, the result would look like a gain."""
    scores = {"pretrained": 0.98, "dense": 0.972, "compressed": 0.969}
    networks = {name: {"test_accuracy": score} for name, score in scores.items()}
    text = read(edit(folder / "metrics.json", results_of(**networks)))
    assert text.splitlines()[0].endswith("test accuracy 98.00 % pretrained → 96.90 % compressed")
    points = dict(re.findall(r"^\| (\w+) \|[^|]*\|[^|]*\| ([^|]*) \|", text, flags=re.MULTILINE))
    assert (points["pretrained"], points["dense"], points["compressed"]) == ("", "-0.80", "-1.10")
    # a network that was trained on, and is better now, is what the result is to be measured against
    text = read(edit(folder / "metrics.json", results_of(pretrained={"test_accuracy": 0.96})))
    assert text.splitlines()[0].endswith("test accuracy 97.20 % dense → 96.90 % compressed")
    points = dict(re.findall(r"^\| (\w+) \|[^|]*\|[^|]*\| ([^|]*) \|", text, flags=re.MULTILINE))
    assert (points["pretrained"], points["dense"], points["compressed"]) == ("-1.20", "", "-0.30")


def test_html_holds_everything_in_order(run, html):
    page = Page(html)
    verdict = words.verdict(run)[1]
    assert page.headings == [
        words.headline(run), "Result", verdict, "Curves", "Layers", "Left dense", "Where this comes from",
    ]  # fmt: skip
    layer = run.plan["layer3.0.conv2"]
    for part in (
        "truncated, raw",
        accuracy(run.network("truncated").test_accuracy_raw),
        f"images: {', '.join(f'{count:.0f} {split}' for split, count in run.results.images.items())} · method tt",
        "FLOPs = 2 x MACs",
        "64 x 64 x 3 x 3",
        ", ".join(map(str, layer.ranks)),
        *layer.notes,
        next(iter(run.plan.skipped.values())),
        "whole model",
        run.results.versions["torch"],
        "crop_padding: 1",
    ):
        assert part in page.text, part
    assert {"approximation-error", "accuracy", "loss", "dual-residual", "penalty", "parameters"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_names_of_layers_are_no_tags(finished, tmp_path):
    """Names come from anybody's model: as keys of settings too, in the block that shows these."""
    folder, tag = (
        shutil.copytree(finished, tmp_path / "run"),
        "<img src=x onerror=alert(1)><script>alert(2)</script>",
    )
    for name in ("plan.json", "metrics.json", "metrics.jsonl"):
        path = folder / name
        path.write_text(path.read_text().replace("layer2.0.conv1", tag))
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"exclude": [tag], "tt_ranks": {tag: 4}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = collect(folder)
    drawn = draw_all(run)
    for text in (render_markdown(run, drawn), render_html(run, drawn)):
        assert "alert(1)" in text.replace("\\", "")
        assert not re.search(r"<(script|img)[^>]*(onerror|>alert)", text)


def test_markdown_holds_the_same(run, drawn):
    text = render_markdown(run, drawn)
    assert text.startswith(f"# {words.headline(run)}")
    rows = [line for line in text.splitlines() if line.startswith(("| layer1", "| layer | type", "| **whole"))]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) > 2


def test_html_loads_nothing_from_anywhere(html):
    assert all(address.startswith("#") for address in Page(html).addresses)
    assert not re.search(r"https?:|@import|<script|<link|<iframe|url\((?!#)", without_script(html))


def without_script(html: str) -> str:
    """A page without the one script that it has, which its policy knows by the hash."""
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert unescape(html).count(f"script-src 'sha256-{digest}'") == 1
    return html.replace(f"<script>{script}</script>", "")


def test_html_is_the_same_every_time(finished, drawn, html):
    """So is each figure, see test_figures."""
    assert render_html(collect(finished), drawn) == html


def test_a_page_fits_dark_and_narrow_screens_and_paper(html):
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "minmax(min(100%, 420px), 1fr)" in html


@pytest.mark.slow
def test_the_report_of_a_large_net_and_a_long_run_is_below_a_megabyte(folder):
    """108 layers, 200 epochs, of numbers that no line runs through."""
    net, noise = build_model("resnet110", in_channels=3, num_classes=10), random.Random(0)
    plan = make_plan(net, 8, example_input=torch.zeros(1, 3, 32, 32))
    plan.save(folder / "plan.json")
    (folder / "spectra.json").write_text(json.dumps(spectra(net, plan)))

    def long(rows):
        keys = ("rho", "primal_residual", "dual_residual", "pull")
        rows[:] = [
            rows[0] | {"epoch": at, "admm/layers": {name: {key: noise.random() for key in keys} for name in plan}}
            for at in range(200)
        ]

    run = collect(edit(folder / "metrics.jsonl", long))
    assert len(run.plan) > 100
    assert len(render_html(run, draw_all(run))) < 1e6


EVIL = "<script>alert(1)</script><img src=x onerror=y>&\"'|`*"


def test_everything_from_files_is_escaped(folder):
    def evil_plan(plan):
        layer = plan["layers"]["layer1.0.conv1"] | {"notes": [EVIL], "aliases": [EVIL]}
        plan.update(rule=EVIL, layers={EVIL: layer, "other": layer}, skipped={EVIL: EVIL})

    def evil_rows(rows):
        rows[0]["admm/layers"] = {EVIL: next(iter(rows[0]["admm/layers"].values()))}
        rows[-1]["phase"] = EVIL

    evil = {"command": EVIL, "seed": EVIL, "versions": {EVIL: EVIL}, "data": {"name": EVIL}, "admm": {"status": EVIL}}
    edit(folder / "plan.json", evil_plan)
    edit(folder / "metrics.jsonl", evil_rows)
    edit(folder / "metrics.json", lambda results: results.update(evil))
    edit(folder / "config.yaml", lambda config: config.update({EVIL: EVIL, "model": EVIL}))
    run = collect(folder)
    drawn = [draw(spec, run) for spec in (CURVES[0], COSTS[0])]
    text = render_html(run, drawn)
    assert "<script" not in without_script(text)
    assert "<img" not in text
    assert Page(text).text.count("alert(1)") > 10
    prose = render_markdown(run, drawn).partition("<pre>")[0]
    assert prose.count("alert(1)") > 10
    assert "<" not in prose
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows[:6]}) == 1


def test_absent_numbers_are_dashes_and_absent_figures_are_explained(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"compressed": {"params": 1000}}), encoding="utf-8")
    run = collect(tmp_path)
    page = Page(render_html(run, draw_all(run)))
    assert "Approximation error is left out. metrics.jsonl holds no epoch of phase admm." in page.text
    assert "Parameters is left out. plan.json names no factorized layer." in page.text
    assert "4 kB" in page.text
    assert "nan" not in page.text.lower()
    assert "None" not in page.text
    assert "None" not in render_markdown(run, draw_all(run))


def test_an_unfinished_run_says_so(copied, tmp_path):
    folder = copied(tmp_path / "run", leave_out=("metrics.json",))
    edit(folder / "metrics.jsonl", lambda rows: rows.__delitem__(slice(2, None)))
    page = Page(render_html(collect(folder), []))
    assert "resnet8 on fake: unfinished, 2 epochs into ADMM training; the plan promises " in page.headings[0]
    assert page.headings[1] == "No ADMM verdict yet"
    assert "The status is written when the run ends." in page.text


def test_a_layer_that_is_shared_says_how_often_it_is_called(folder):
    def shared(plan):
        layer = plan["layers"]["layer1.0.conv1"]
        layer["call_sites"][0][0] = 2
        layer["aliases"] = ["again"]

    edit(folder / "plan.json", shared)
    text = read(folder)
    assert "- called 2 times per image: layer1.0.conv1\n" in text
    assert "- shared with again: layer1.0.conv1\n" in text


@pytest.mark.parametrize(
    ("retraining", "said"),
    [
        ({"lr": 0.02, "probes": 0, "end": None}, "was 0.02, as the settings give it."),
        ({"lr": 0.025, "probes": 6, "end": None}, "was 0.025, found by 6 short descents."),
        (
            {"lr": 0.1, "probes": 8, "end": "highest"},
            "8 short descents: the highest of those tried, so that a better one",
        ),
        ({"lr": 0.1, "probes": 4, "end": None, "level": 3}, "4 short descents; 3 of the others ended level with it."),
        ({}, ""),  # of a run without retraining, or of an earlier version
    ],
)
def test_the_rate_of_retraining_is_said(folder, retraining, said):
    text = read(edit(folder / "metrics.json", lambda results: results.update(retraining=retraining)))
    assert said in text
    assert ("The rate of retraining" in text) == bool(retraining)


def verdict_of(folder, *, rows=(), **admm):
    """The paragraph on ADMM after editing epochs of ADMM and the outcome."""
    edit(folder / "metrics.json", lambda results: results["admm"].update(admm))
    if rows:
        edit(folder / "metrics.jsonl", lambda old: old.__setitem__(slice(0, 2), [{**old[0], **row} for row in rows]))
    return words.verdict(collect(folder)), re.search(r"##.*\n\n(.*)\n\n## Curves", read(folder)).group(1)


@pytest.mark.parametrize(("pull", "said"), [(0.02, "Raise admm.rho"), (0.8, "Lower admm.rho")])
def test_a_diverged_run_is_advised_by_its_pull(pull, said, folder):
    # the learning rate ends at 0 and the pull with it: the last epoch must not decide
    rows = [{"epoch": epoch, "admm/pull": pull if epoch < 3 else 0.0} for epoch in range(4)]
    _, text = verdict_of(folder, rows=rows, status="diverged")
    assert [advice for advice in ("Raise admm.rho", "Lower admm.rho") if advice in text] == [said]


@pytest.mark.parametrize(
    ("status", "tone", "title", "said"),
    [
        ("converged", "good", "ADMM converged", "within the tolerance"),
        ("epochs ended", "good", "ADMM ran to the end of its epochs", "fell from 62.5 % to 25.0 %"),
        ("diverged", "bad", "ADMM diverged", "Lower admm.rho"),
        ("off", "calm", "ADMM was off", "the control"),
        ("paused", "calm", "ADMM: paused", "fell from 62.5 % to 25.0 %"),
    ],
)
def test_each_verdict_is_explained(status, tone, title, said, folder):
    scores = {"dense": 0.972, "truncated": 0.9583, "compressed": 0.969}
    edit(folder / "metrics.json", results_of(**{name: {"test_accuracy": value} for name, value in scores.items()}))
    rows = [{"epoch": epoch, "admm/primal_residual": 0.625 - 0.375 * epoch, "admm/pull": 0.8} for epoch in range(2)]
    verdict, text = verdict_of(folder, rows=rows, status=status, primal_residual=0.25)
    assert verdict == (tone, title)
    assert said in text
    assert "Truncation took the test accuracy from 97.20 % to 95.83 %; retraining ended at 96.90 %. The rate" in text


def test_a_run_that_kept_its_accuracy_is_not_told_to_do_better(folder):
    far = {"status": "epochs ended", "primal_residual": 0.25}
    networks = {name: {"test_accuracy": 0.97} for name in ("dense", "truncated", "compressed")}
    edit(folder / "metrics.json", results_of(**networks))
    (tone, _), text = verdict_of(folder, **far)
    assert (tone, "More epochs" in text, "more epochs" in text) == ("good", False, False)
    assert "Truncation left the test accuracy at 97.00 %; retraining ended at 97.00 %." in text
    edit(folder / "metrics.json", results_of(compressed={"test_accuracy": 0.8}))
    (tone, _), text = verdict_of(folder, **far)
    assert tone == "warn"
    assert "more epochs (dense_epochs)" in text


def test_a_rising_residual_and_a_weak_pull_are_named(folder):
    rows = [{"epoch": epoch, "admm/primal_residual": 0.6 + 0.1 * epoch, "admm/pull": 0.18} for epoch in range(3)]
    _, text = verdict_of(folder, rows=rows, status="epochs ended", primal_residual=0.8)
    assert "rose from 60.0 % to 80.0 % in 3 epochs" in text
    assert "The pull was 0.18 in the middle: below 0.3" in text


def test_more_parameters_are_called_more(folder):
    edit(folder / "metrics.json", lambda results: results["reduction"].update(params=-0.1, macs=0.0))
    assert "10.0 % more parameters, 0.0 % fewer MACs" in words.headline(collect(folder))


def test_write_report_writes_whole_files_and_takes_stale_figures_away(folder, monkeypatch):
    assert write_report(folder) == folder / "report.html"
    names = {path.name for path in (folder / "figures").iterdir()}
    stems = (
        "before-and-after",
        "ranks",
        "spectra",
        "approximation-error",
        "accuracy",
        "loss",
        "dual-residual",
        "penalty",
        "pull",
        "parameters",
        "macs",
    )
    assert names == {f"{stem}{ending}" for stem in stems for ending in (".png", ".svg")}
    links = re.findall(r"\]\(([^)]*)\)", (folder / "report.md").read_text(encoding="utf-8"))
    assert len(links) == 11
    assert all((folder / link).exists() for link in links)
    (folder / "metrics.jsonl").unlink()
    monkeypatch.setattr(render, "draw_all", lambda run: [draw(spec, run) for spec in CURVES])  # the others as they were
    write_report(folder)
    assert {path.stem for path in (folder / "figures").iterdir()} == {
        "before-and-after", "ranks", "spectra", "parameters", "macs",
    }  # fmt: skip
    assert not [path for path in folder.rglob(".*")]


def test_a_failed_write_keeps_the_older_report_and_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    write_report(tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"there is no space left; free some space"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.rglob(".*")]


def test_what_was_lost_stands_first_with_how_sure_that_is(folder):
    edit(folder / "metrics.json", results_of(dense={"test_accuracy": 0.95}, compressed={"test_accuracy": 0.93}))
    edit(folder / "metrics.json", lambda results: results["data"]["images"].update(test=200))
    edit(folder / "metrics.json", lambda results: results.update(against={"dense": {"lost": 6, "won": 2}}))
    edit(folder / "metrics.json", lambda results: results.pop("pretrained", None))
    tone, title, text = words.outcome(collect(folder))
    assert (tone, title) == ("calm", "2.00 points lost")
    assert "93.00 % on 200 test images, 95 % interval 88.59 % to 95.78 %" in text
    assert "2 right that the dense network has wrong, and 6 the other way round" in text
    assert "may be chance (McNemar's exact test, p = 0.29)" in text
    page = Page(render_html(collect(folder), []))
    assert page.text.index("2.00 points lost") < page.text.index("Result")
    edit(folder / "metrics.json", lambda results: results.update(against={"dense": {"lost": 40, "won": 5}}))
    tone, _, text = words.outcome(collect(folder))
    assert (tone, "is more than chance" in text) == ("warn", True)
    edit(folder / "metrics.json", results_of(compressed={"test_accuracy": 0.95}))
    assert words.outcome(collect(folder))[:2] == ("good", "No accuracy lost")
