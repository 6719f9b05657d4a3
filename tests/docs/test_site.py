"""The figures show what was measured and computed; the site builds without a broken link and asks no other host."""

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def draw():
    return runpy.run_path(str(FIGURES / "draw.py"))


@pytest.mark.parametrize("name", ["what_it_does", "spectrum", "macs"])
def test_every_figure_can_be_drawn_anew_and_is_shown(draw, name):
    texts = [draw["adaptive"](draw["to_svg"](draw["FIGURES"][name]())), (FIGURES / f"{name}.svg").read_text("utf-8")]
    drawn, kept = [re.findall(r">([^<>\n]+)</text>", text) for text in texts]
    assert drawn == kept  # the same titles, ticks and numbers; paths differ with the version of matplotlib
    assert f"figures/{name}.svg" in CONCEPTS + INDEX
    assert "prefers-color-scheme: dark" in texts[0]


def test_the_first_page_says_what_its_runs_had():
    runs = json.loads((FIGURES / "runs.json").read_text(encoding="utf-8"))
    left = {cost: 100 * runs["admm"][cost][1] / runs["admm"][cost][0] for cost in ("params", "macs")}
    assert f"**2** So the layers can be swapped for factors: {left['params']:.1f} %" in INDEX
    assert f"{left['macs']:.1f} % of" in INDEX
    dense, cut, *_ = runs["admm"]["accuracy"]
    assert dense == cut  # "loses nothing by that"
    assert runs["off"]["accuracy"][1] < 0.2  # "the other one guesses"
    assert max(runs["admm"]["spectrum"][runs["rank"] :]) < 0.01 < min(runs["off"]["spectrum"])


def test_the_page_says_what_the_spectra_show():
    data = json.loads((FIGURES / "spectrum.json").read_text(encoding="utf-8"))
    for name in ("admm", "plain"):
        assert f"{100 * data[name]['truncated']:.1f} %" in CONCEPTS
    last = {name: data[name]["spectra"][-1] for name in ("admm", "plain")}
    rank = data["admm"]["rank"]
    assert 3.4 < -math.log10(last["admm"][rank] / data["admm"]["spectra"][0][rank]) < 3.6
    assert min(last["plain"]) > 0.4


def test_the_page_says_what_the_two_orders_cost(draw):
    costs = draw["costs"]
    size, macs = costs("tt_classical", 14)
    assert macs > 1 > costs("tt_classical", 12)[1]
    assert 0.055 < size < 0.07
    assert 9.5 < costs("tt_classical", 128)[1] < 10.5
    assert all(costs("tt", rank)[1] < 1 for rank in range(2, 129, 2))
    same = next(costs("tt", rank) for rank in range(2, 129) if costs("tt", rank)[0] >= costs("tt_classical", 128)[0])
    assert 9 < costs("tt_classical", 128)[1] / same[1] < 13


@pytest.mark.slow
def test_spectra_are_trained_anew(tmp_path):
    """Two epochs in place of fifteen."""
    out = tmp_path / "spectrum.json"
    subprocess.run([sys.executable, FIGURES / "train_spectrum.py", "--epochs", "2", "--out", out], check=True)
    assert [len(json.loads(out.read_text())[name]["spectra"]) for name in ("admm", "plain")] == [3, 3]


def test_every_page_stands_once_in_the_navigation():
    pages = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2], re.MULTILINE)
    assert len(pages) == len(set(pages)) > 35


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_asks_no_other_host(tmp_path):
    """Needs the extra ``docs``."""
    pytest.importorskip("mkdocs", reason="needs the extra docs: pip install -e '.[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]  # --quiet lets all pass
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(site.rglob("*.html"))) > 35
    assert not list(site.rglob("__pycache__"))
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)="?(https?:)?//', page.read_text())
        assert loaded == [], page


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_from_the_first_cell_to_the_last(notebook, tmp_path):
    """Needs the extra ``docs``."""
    pytest.importorskip("nbclient", reason="needs the extra docs: pip install -e '.[docs]'")
    copy = shutil.copy(notebook, tmp_path)
    subprocess.run([sys.executable, ROOT / "notebooks" / "run.py", copy], check=True)
    cells = [cell for cell in json.loads(Path(copy).read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
