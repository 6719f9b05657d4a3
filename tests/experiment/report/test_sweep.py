"""The Hydra callback: writes after a real multirun, even after a failed one, and never raises."""

import logging
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from hodec.experiment.report.sweep import SweepReport

APP = """
import json
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


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


def multirun(folder, *overrides):
    (folder / "app.py").write_text(APP, encoding="utf-8")
    report = "+hydra.callbacks.report._target_=hodec.experiment.report.sweep.SweepReport"
    command = [sys.executable, "app.py", "-m", "hydra.sweep.dir=sweep", report, *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("rhos", "code"), [("0.1,0.2", 0), ("0.9,0.1", 1)], ids=["good", "one failed"])
def test_a_multirun_ends_with_a_sweep_page(rhos, code, tmp_path):
    result = multirun(tmp_path, f"+rho={rhos}")
    assert result.returncode == code, result.stderr
    text = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    for rho in rhos.split(","):
        assert f"rho={rho}" in text
    assert (result.stdout + result.stderr).count("sweep report:") == 1


def test_a_multirun_that_starts_no_run_is_silent(tmp_path):
    result = multirun(tmp_path, "+rho=[0.1")
    assert result.returncode == 1
    assert "sweep report" not in result.stdout + result.stderr


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


def test_naming_the_callback_does_not_load_matplotlib():
    code = "import sys, hodec.experiment.report.sweep; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
