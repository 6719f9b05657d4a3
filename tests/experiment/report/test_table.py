"""The tables beside the page of a sweep."""

import csv
import json
import shutil
import subprocess
from statistics import mean, stdev

import pytest

from hodec.cli.main import main as hodec
from hodec.experiment.report import table
from hodec.experiment.report.collect import collect_sweep
from hodec.experiment.report.render import write_sweep

from report_edits import edit  # isort: skip

SCORES = {("0.001", 0): 0.90, ("0.001", 1): 0.92, ("0.01", 0): 0.80, ("0.01", 1): 0.86}


@pytest.fixture
def seeds(copied, tmp_path):
    """Two rho, two seeds each, and one run that failed."""
    root = tmp_path / "multirun"
    for at, ((rho, seed), score) in enumerate(SCORES.items()):
        one = copied(root / str(at))
        (one / ".hydra").mkdir()
        (one / ".hydra" / "overrides.yaml").write_text(f"- admm.rho={rho}\n- seed={seed}\n", encoding="utf-8")
        scores = {"validation_accuracy": score, "test_accuracy": score - 0.01}
        edit(one / "metrics.json", lambda results, new=scores: results["compressed"].update(new))
    failed = root / "4"
    (failed / ".hydra").mkdir(parents=True)
    (failed / ".hydra" / "overrides.yaml").write_text("- admm.rho=1_%\n- seed=0\n", encoding="utf-8")
    (failed / "error.txt").write_text("ConfigError: admm.rho: '1_%' given | allowed: a number\n", encoding="utf-8")
    return root


def test_every_run_is_a_line_with_its_settings_numbers_and_error(seeds):
    write_sweep(seeds)
    with (seeds / "sweep.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [(one["admm.rho"], one["seed"]) for one in rows[:4]] == [(rho, str(seed)) for rho, seed in SCORES]
    metrics = json.loads((seeds / "0" / "metrics.json").read_text())
    assert float(rows[0]["validation_accuracy"]) == 0.90
    assert float(rows[0]["macs"]) == metrics["compressed"]["macs"]
    assert float(rows[0]["params_cut"]) == metrics["reduction"]["params"]
    assert [one["state"] for one in rows] == ["finished"] * 4 + ["failed"]
    assert rows[4]["error"] == "ConfigError: admm.rho: '1_%' given | allowed: a number"
    page = (seeds / "sweep.html").read_text(encoding="utf-8")
    assert "ConfigError: admm.rho" in page
    assert "Over the seeds" in page


def test_seeds_are_put_together(seeds):
    write_sweep(seeds)
    content = json.loads((seeds / "sweep.json").read_text())
    assert content["best"] == "1"
    assert content["best_settings"] == {"admm.rho": "0.001"}
    page = (seeds / "sweep.html").read_text(encoding="utf-8")
    assert "best by mean validation accuracy over 2 seeds, 91.00 %: admm.rho=0.001, test accuracy" in page
    assert len(content["runs"]) == 5
    for one, (rho, values) in zip(
        content["groups"], {"0.001": (0.90, 0.92), "0.01": (0.80, 0.86)}.items(), strict=True
    ):
        assert one["settings"] == {"admm.rho": rho}
        assert one["runs"] == 2
        assert one["mean"]["validation_accuracy"] == pytest.approx(mean(values))
        assert one["std"]["validation_accuracy"] == pytest.approx(stdev(values))
    text = (seeds / "sweep.md").read_text(encoding="utf-8")
    assert "| 0.001 | 2 |" in text
    assert "91.00 ± 1.41" in text
    assert "given \\| allowed" in text


def test_runs_of_one_seed_are_not_told_as_seeds(seeds):
    for at in ("0", "1"):
        (seeds / at / ".hydra" / "overrides.yaml").write_text("- admm.rho=0.001\n- seed=0\n", encoding="utf-8")
    write_sweep(seeds)
    assert "best by mean validation accuracy over 2 runs, 91.00 %" in (seeds / "sweep.html").read_text(encoding="utf-8")


def test_one_run_has_no_spread(sweep):
    assert all(not one.spreads for one in table.groups(collect_sweep(sweep)))
    assert "±" not in table.to_markdown(collect_sweep(sweep)).split("\n\n")[0]


def test_the_latex_table_holds_the_same_rows_and_escapes_signs(seeds):
    edit(seeds / "3" / ".hydra" / "overrides.yaml", lambda lines: lines.__setitem__(0, "admm.rho={0_%:1}&$#^~\\<"))
    text = table.to_latex(collect_sweep(seeds))
    assert r"91.00 $\pm$ 1.41" in text
    assert r"\{0\_\%:1\}\&\$\#\textasciicircum{}\textasciitilde{}\textbackslash{}\textless{}" in text
    assert text.count("\\\\\n") == 4, "a head and three groups"


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs LaTeX")
def test_the_latex_table_compiles(seeds, tmp_path):
    edit(seeds / "3" / ".hydra" / "overrides.yaml", lambda lines: lines.__setitem__(0, "admm.rho={0_%:1}&$#^~\\<"))
    body = table.to_latex(collect_sweep(seeds))
    (tmp_path / "page.tex").write_text(f"\\documentclass{{article}}\\begin{{document}}\n{body}\\end{{document}}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_one_lucky_seed_is_not_the_best_setting(seeds):
    edit(seeds / "2" / "metrics.json", lambda results: results["compressed"].update(validation_accuracy=0.95))
    content = json.loads(table.to_json(collect_sweep(seeds)))
    assert (content["best"], content["best_settings"]) == ("2", {"admm.rho": "0.001"})


def test_any_runs_are_compared(seeds, tmp_path, capsys):
    out = tmp_path / "out"
    assert hodec(["report", str(seeds / "0"), str(seeds / "2"), "-o", str(out)]) == 0
    assert str(out / "sweep.html") in capsys.readouterr().out
    content = json.loads((out / "sweep.json").read_text())
    assert [one["admm.rho"] for one in content["runs"]] == ["0.001", "0.01"]
    assert (out / "sweep-error.png").exists()
    assert hodec(["report", str(seeds / "0"), str(tmp_path), "-o", str(out)]) == 2
