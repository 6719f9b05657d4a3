"""One real tiny run; a variant of it is a copy in which something that the run wrote was edited."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hodec.experiment.pipeline import run

from report_edits import edit  # isort: skip
from tiny_runs import tiny  # isort: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run as the pipeline leaves it; nobody writes into it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    run(tiny(), folder)
    return folder


@pytest.fixture
def copied(finished: Path) -> Callable[..., Path]:
    """``copied(target, leave_out=("metrics.json",))``: a copy of the files that a report reads."""

    def copy(target: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
        target.mkdir(parents=True)
        for name in {"config.yaml", "plan.json", "metrics.jsonl", "metrics.json", "spectra.json"}.difference(leave_out):
            shutil.copyfile(finished / name, target / name)
        return target

    return copy


@pytest.fixture
def folder(copied: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return copied(tmp_path / "run")


@pytest.fixture
def sweep(copied: Callable[..., Path], tmp_path: Path) -> Path:
    """A multirun over rho: three runs, one that was killed, one that is broken, one that never began."""
    root = tmp_path / "multirun"
    validation = {"0.001": 0.97, "0.01": 0.98, "0.1": 0.96}  # another order than that of the test accuracy
    for at, (rho, accuracy) in enumerate({"0.001": 0.95, "0.01": 0.96, "0.1": 0.97, "1": None, "10": None}.items()):
        one = copied(root / str(at), leave_out=() if accuracy else ("metrics.json",))
        (one / ".hydra").mkdir()
        (one / ".hydra" / "overrides.yaml").write_text(f"- admm.rho={rho}\n- seed=0\n", encoding="utf-8")
        edit(one / "config.yaml", lambda config, rho=rho: config["admm"].update(rho=float(rho)))
        if accuracy:
            scores = {"test_accuracy": accuracy, "validation_accuracy": validation[rho]}
            edit(one / "metrics.json", lambda results, new=scores: results["compressed"].update(new))
    edit(root / "3" / "metrics.jsonl", lambda rows: rows.__delitem__(slice(1, None)))
    (root / "4" / "plan.json").write_text('{"format": "hodec-plan", "layers": {', encoding="utf-8")
    (root / "10" / ".hydra").mkdir(parents=True)
    (root / "10" / ".hydra" / "overrides.yaml").write_text("- admm.rho=abc\n- seed=0\n", encoding="utf-8")
    return root
