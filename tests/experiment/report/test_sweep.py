"""The page of a sweep, and its Hydra callback: after a real multirun, even after a failed one, and never raising."""

import logging
import pickle
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from hodec.experiment.report.render import write_sweep
from hodec.experiment.report.sweep import SweepReport

from report_page import Page  # isort: skip

APP = """
import json
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import hodec.experiment.report.sweep

if "matplotlib" in sys.modules:
    sys.exit("naming the callback has loaded matplotlib")


@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(config):
    folder = Path(HydraConfig.get().runtime.output_dir)
    OmegaConf.save(OmegaConf.create({"rho": config.rho}), folder / "config.yaml")
    row = {"phase": "admm", "epoch": 0, "train/loss": 1.0, "admm/primal_residual": config.rho}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
    if config.rho > 0.5:
        raise ValueError("too much")


main()
"""


@pytest.mark.slow
def test_a_multirun_in_which_a_run_failed_ends_with_a_sweep_page(tmp_path):
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    report = "+hydra.callbacks.report._target_=hodec.experiment.report.sweep.SweepReport"
    command = [sys.executable, "app.py", "-m", "hydra.sweep.dir=sweep", report, "+rho=0.9,0.1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr
    assert "too much" in result.stderr
    text = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    assert "rho=0.9" in text
    assert (result.stdout + result.stderr).count("sweep report:") == 1


def test_a_multirun_that_ends_well_has_a_sweep_page_at_once(copied, tmp_path, monkeypatch, caplog):
    copied(tmp_path / "sweep" / "0")
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr("atexit.unregister", registered.remove)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
    callback = SweepReport()
    with caplog.at_level(logging.INFO):
        callback.on_multirun_start(config)
        assert len(registered) == 1
        callback.on_multirun_end(config)
    assert not registered
    assert (tmp_path / "sweep" / "sweep.html").exists()
    assert "sweep report:" in caplog.text


def test_a_multirun_that_starts_no_run_is_silent(tmp_path, monkeypatch, caplog):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    callback = SweepReport()
    callback.on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}}))
    (at_exit,) = registered
    at_exit()
    assert not caplog.text


def test_a_folder_without_runs_is_a_warning(tmp_path, caplog):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    with caplog.at_level(logging.WARNING):
        SweepReport().on_multirun_end(config)
    assert "no sweep report" in caplog.text
    assert str(tmp_path) in caplog.text


def test_a_config_without_hydra_is_a_warning(caplog):
    callback = SweepReport()
    with caplog.at_level(logging.WARNING):
        callback.on_multirun_start(OmegaConf.create({}))
        callback.on_multirun_end(OmegaConf.create({}))
    assert caplog.text.count("no sweep report") == 2


def test_a_parallel_launcher_can_send_the_callback_to_its_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("atexit.register", lambda call: None)
    callback = SweepReport()
    callback.on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    pickle.dumps(callback)
    callback.on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))


def test_the_sweep_page_lists_failed_and_unfinished_runs(sweep):
    (sweep / "1" / "report.html").write_text("", encoding="utf-8")
    path = write_sweep(sweep)
    assert path == sweep / "sweep.html"
    assert (sweep / "sweep-error.png").exists()
    assert (sweep / "sweep-error.svg").exists()
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings[0] == (
        "6 runs of resnet8 on fake, 3 finished; "
        "best by validation accuracy, 98.00 %: admm.rho=0.01, test accuracy 96.00 %"
    )
    assert "unfinished, 1 epoch into ADMM training" in page.text
    assert "plan.json is broken" in page.text
    assert "stopped before its config was written" in page.text
    tables = [f"sweep.{ending}" for ending in ("csv", "json", "md", "tex")]
    assert [address for address in page.addresses if not address.startswith("#")] == ["1/report.html", *tables]
    assert all((sweep / name).exists() for name in tables)
    (best,) = re.findall(r'<tr class="strong">\s*<th scope="row"><a[^>]*>([^<]*)', text)
    assert best == "admm.rho=0.01", "the test set is not there to choose by"


def test_links_of_a_sweep_survive_signs_in_folder_names(copied, tmp_path):
    folder = copied(tmp_path / "0_ranks-[8,8]#%?")
    (folder / "report.html").write_text("", encoding="utf-8")
    page = Page(write_sweep(tmp_path).read_text(encoding="utf-8"))
    assert "0_ranks-%5B8%2C8%5D%23%25%3F/report.html" in page.addresses


def test_a_sweep_without_any_epoch_still_has_its_table(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    page = Page(write_sweep(tmp_path).read_text(encoding="utf-8"))
    assert "1 run of network, 0 finished" in page.text
    assert "Approximation error is left out." in page.text
    assert not (tmp_path / "sweep-error.png").exists()
