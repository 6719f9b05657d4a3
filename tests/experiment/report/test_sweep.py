"""The Hydra callback: writes after a real multirun, even after a failed one, and never raises."""

import logging
import pickle
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from hodec.experiment.report.sweep import SweepReport

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
