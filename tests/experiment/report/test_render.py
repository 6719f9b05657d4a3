"""The written reports: complete, offline, escaped, whole."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from hodec.errors import CheckpointError
from hodec.experiment.report import tables, words
from hodec.experiment.report.collect import collect
from hodec.experiment.report.render import render_html, render_markdown, write_report, write_sweep
from hodec.experiment.report.rundata import Network

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and gathers text, ids and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.ids, self.addresses, self.headings = [], "", [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        data = data.replace("\u00a0", " ")
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory):
    return collect(run_folder(tmp_path_factory.mktemp("render") / "run"))


@pytest.fixture(scope="module")
def html(run):
    return render_html(run)


def test_the_headline_says_what_was_won_and_lost(run):
    assert words.headline(run) == (
        "resnet20 on digits: 78.8 % fewer parameters, 72.0 % fewer MACs; "
        "test accuracy 97.20 % dense → 96.90 % compressed"
    )


def test_what_admm_cost_the_dense_net_is_not_left_out(run):
    """Beside a dense net that ADMM has held back alone, the result would look like a gain."""
    networks = dict(run.outcome.networks)
    before = Network(accuracy=0.98, params=networks["dense"].params, macs=networks["dense"].macs)
    began = replace(run, outcome=replace(run.outcome, networks={"pretrained": before, **networks}))
    assert words.headline(began).endswith("test accuracy 98.00 % pretrained → 96.90 % compressed")
    points = {row.cells[0].text: row.cells[3].text for row in tables.results(began).rows}
    assert (points["pretrained"], points["dense"], points["compressed"]) == ("", "-0.80", "-1.10")
    # a dense net that was trained on, and is better now, is what the result is to be measured against
    worse = replace(before, accuracy=0.96)
    better = replace(run, outcome=replace(run.outcome, networks={"pretrained": worse, **networks}))
    assert words.headline(better).endswith("test accuracy 97.20 % dense → 96.90 % compressed")
    points = {row.cells[0].text: row.cells[3].text for row in tables.results(better).rows}
    assert (points["pretrained"], points["dense"], points["compressed"]) == ("-1.20", "", "-0.30")


def test_html_holds_everything_in_order(run, html):
    page = Page(html)
    expected = [
        words.headline(run),
        "Result",
        "ADMM converged",
        "Curves",
        "Layers",
        "Left dense",
        "Where this comes from",
    ]
    assert page.headings == expected
    for part in (
        "truncated, raw",
        "94.17 %",
        "images: 1,294 train, 144 validation, 359 test",
        "1.19 MB",
        "FLOPs = 2 x MACs",
        "64 x 64 x 3 x 3",
        "4, 20, 20, 4",
        "rank 24 clipped to 20",
        "not worth it",
        "whole model",
        "train.py model=resnet20",
        "2.15.0",
        "update_every: epoch",
    ):
        assert part in page.text, part
    assert len(page.ids) == len(set(page.ids))


def test_html_loads_nothing_from_anywhere(html):
    assert all(address.startswith("#") for address in Page(html).addresses)
    assert not re.search(r"https?:|@import|<script|<link|<iframe|url\((?!#)", html)


def test_html_is_the_same_every_time(run, html):
    assert render_html(run) == html


def test_dark_and_print_styles_are_there(html):
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


EVIL = "<script>alert(1)</script>&\"'|`*"


def test_everything_from_files_is_escaped(files_in, tmp_path):
    layers = {EVIL: {"kind": EVIL, "notes": [EVIL], "params_before": 10, "params_after": 5, "aliases": [EVIL]}}
    plan = {"format": "hodec-plan", "rule": EVIL, "layers": layers, "skipped": {EVIL: EVIL}}
    row = {"phase": EVIL, "epoch": 0, "val/loss": 1.0}
    admm = {"phase": "admm", "epoch": 0, "admm/layers": {EVIL: {"rho": 1, "primal_residual": 1.0}}}
    outcome = {
        "command": EVIL,
        "seed": EVIL,
        "versions": {EVIL: EVIL},
        "data": {"name": EVIL},
        "admm": {"status": EVIL},
    }
    config = {"model": EVIL, EVIL: EVIL}
    run = collect(files_in(tmp_path, config=config, plan=plan, rows=[row, admm], outcome=outcome))
    text = render_html(run)
    assert "<script" not in text
    page = Page(text)
    assert page.text.count("alert(1)") > 10
    markdown = render_markdown(run)
    prose, _, _ = markdown.partition("```")
    assert "<script" not in prose
    table = [line for line in prose.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]}) == 1


def test_absent_numbers_are_dashes_and_absent_figures_are_explained(files_in, tmp_path):
    run = collect(files_in(tmp_path, outcome={"compressed": {"params": 1000}}))
    page = Page(render_html(run))
    assert "Approximation error is left out. metrics.jsonl holds no epoch of phase admm." in page.text
    assert "Cost of each layer is left out. plan.json names no factorized layer." in page.text
    assert "4.00 kB" in page.text
    assert "nan" not in page.text.lower()
    assert "None" not in page.text


def test_an_unfinished_run_says_so(run_folder, tmp_path):
    run = collect(run_folder(tmp_path / "run", phases={"admm": 5}, finished=False))
    page = Page(render_html(run))
    assert "has not finished" in page.text
    assert page.headings[0] == (
        "resnet20 on digits: unfinished, 5 epochs into ADMM training; "
        "the plan promises 78.8 % fewer parameters, 72.0 % fewer MACs"
    )
    assert "has not finished" in render_markdown(run)


@pytest.mark.parametrize(("pull", "said"), [(0.02, "Raise admm.rho"), (0.8, "Lower admm.rho")])
def test_a_diverged_run_is_advised_by_its_pull(pull, said, files_in, tmp_path):
    # the learning rate ends at 0 and the pull with it: the last epoch must not decide
    rows = [{"phase": "admm", "epoch": epoch, "admm/pull": pull} for epoch in range(3)]
    rows.append({"phase": "admm", "epoch": 3, "admm/pull": 0.0})
    text = words.verdict(collect(files_in(tmp_path, rows=rows, outcome={"admm": {"status": "diverged"}}))).text
    assert [advice for advice in ("Raise admm.rho", "Lower admm.rho") if advice in text] == [said]


@pytest.mark.parametrize(
    ("status", "title", "said"),
    [
        ("converged", "ADMM converged", "within the tolerance"),
        ("epochs ended", "ADMM ran to the end of its epochs", "fell from 62.5 % to"),
        ("diverged", "ADMM diverged", "Lower admm.rho"),
        ("off", "ADMM was off", "the control"),
        ("paused", "ADMM: paused", "fell from 62.5 % to"),
    ],
)
def test_each_verdict_is_explained(status, title, said, run_folder, tmp_path):
    verdict = words.verdict(collect(run_folder(tmp_path / "run", status=status)))
    assert verdict.title == title
    assert said in verdict.text
    assert "Truncation took the test accuracy from 97.20 % to 95.83 %; retraining ended at 96.90 %." in verdict.text


def test_a_rising_residual_and_a_weak_pull_are_named(files_in, tmp_path):
    rows = [
        {"phase": "admm", "epoch": epoch, "admm/primal_residual": 0.6 + 0.1 * epoch, "admm/pull": 0.18}
        for epoch in range(3)
    ]
    run = collect(files_in(tmp_path, rows=rows, outcome={"admm": {"status": "epochs ended", "primal_residual": 0.8}}))
    verdict = words.verdict(run)
    assert "rose from 60.0 % to 80.0 % in 3 epochs" in verdict.text
    assert "The pull was 0.18 in the middle" in verdict.text
    assert verdict.tone == "warn"


def test_more_parameters_are_called_more(files_in, tmp_path):
    outcome = {"dense": {"params": 100, "macs": 100}, "compressed": {"params": 110, "macs": 100}}
    assert words.headline(collect(files_in(tmp_path, outcome=outcome))) == (
        "network: 10.0 % more parameters, 0.0 % fewer MACs"
    )


def test_write_report_writes_whole_files_and_takes_stale_figures_away(run_folder, tmp_path):
    folder = run_folder(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    names = {path.name for path in (folder / "figures").iterdir()}
    stems = ("approximation-error", "training-curves", "dual-and-rho", "layer-costs")
    assert names == {f"{stem}{ending}" for stem in stems for ending in (".png", ".svg")}
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]*)\)", markdown)
    assert len(links) == 4
    assert all((folder / link).exists() for link in links)
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    assert {path.stem for path in (folder / "figures").iterdir()} == {"layer-costs"}
    assert not [path for path in folder.rglob(".*")]


def test_a_failed_write_keeps_the_older_report_and_says_what_to_do(files_in, tmp_path, monkeypatch):
    folder = files_in(tmp_path / "run", config={"seed": 0})
    write_report(folder)
    before = (folder / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device.*Free some space"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.rglob(".*")]


def test_the_sweep_page_lists_failed_and_unfinished_runs(sweep_folder):
    write_report(sweep_folder / "2")
    path = write_sweep(sweep_folder)
    assert path == sweep_folder / "sweep.html"
    assert (sweep_folder / "sweep.png").exists()
    assert (sweep_folder / "sweep.svg").exists()
    page = Page(path.read_text(encoding="utf-8"))
    assert page.headings[0] == (
        "6 runs of resnet20 on digits, 3 finished; "
        "compressed test accuracy 95.00 % (admm.rho=0.001) to 97.00 % (admm.rho=0.1)"
    )
    assert "unfinished, 5 epochs into ADMM training" in page.text
    assert "plan.json is not readable as JSON" in page.text
    assert "stopped before its config was written" in page.text
    links = [address for address in page.addresses if not address.startswith("#")]
    assert links == ["2/report.html"]


def test_links_of_a_sweep_survive_signs_in_folder_names(run_folder, tmp_path):
    folder = run_folder(tmp_path / "0_ranks-[8,8]#%?", phases={"admm": 2})
    (folder / "report.html").write_text("", encoding="utf-8")
    page = Page(write_sweep(tmp_path).read_text(encoding="utf-8"))
    assert "0_ranks-%5B8%2C8%5D%23%25%3F/report.html" in page.addresses


def test_a_sweep_without_any_epoch_still_has_its_table(files_in, tmp_path):
    files_in(tmp_path / "0", config={"seed": 0})
    page = Page(write_sweep(tmp_path).read_text(encoding="utf-8"))
    assert "1 run of network, 0 finished" in page.text
    assert "ADMM in each run is left out." in page.text
    assert not (tmp_path / "sweep.png").exists()
