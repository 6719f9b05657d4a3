"""python -m pytest: a short run of everything, and the method's mathematics."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from my_project.method import BalancedSplit

from hodec.formats.modes import Modes

ROOT = Path(__file__).parents[1]


def test_a_short_run(tmp_path: Path) -> None:
    options = ["--trust", "my_project", "--config-dir", "conf", "experiment=own"]
    short = ["dense_epochs=1", "retrain_epochs=1", "model.width=8", f"hydra.run.dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "hodec.experiment", *options, *short], cwd=ROOT, check=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["compressed"]["params"] < metrics["dense"]["params"]
    assert (tmp_path / "report.html").exists()


def test_the_method_is_exact_at_full_rank() -> None:
    split, weight, modes = BalancedSplit(), torch.randn(6, 4, 3, 3), Modes((4,), (6,))
    factors = split.decompose(weight, split.max_ranks(weight.shape, modes), modes)
    torch.testing.assert_close(split.reconstruct(factors, weight.shape, modes), weight, rtol=1e-4, atol=1e-5)
