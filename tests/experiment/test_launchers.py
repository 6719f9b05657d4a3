"""Sweeps of six runs as jobs of submitit and of Ray: one that fails, a kill, a second start that repeats nothing.

Slow. Needs the packages of the extras ``slurm`` and ``ray``; Ray starts a cluster of its own on this machine.
"""

import csv
import importlib.util
import json
import os
import signal
import time
from contextlib import suppress

import pytest
from train_script import StartedSmall, finished, wait

pytestmark = pytest.mark.slow
SETTINGS = (
    "data=fake", "data.fake_size=64", "data.fake_classes=4", "data.image_size=8", "data.batch_size=16",
    "data.val_fraction=0.25", "method.n_modes=1", "dense_epochs=2", "retrain_epochs=1", "bn_batches=1", "tt_ranks=4",
    "trainer.accelerator=cpu", "trainer.threads=1", "report=false",
)  # fmt: skip
RHOS = ("1e-4", "1e-3", "1e30", "1e-2", "1e-1", "1")  # the third ends in NaN
LAUNCHERS = {
    "local_jobs": ("hydra_plugins.hydra_submitit_launcher", ()),
    "ray_jobs": ("hydra_plugins.hydra_ray_launcher", ("+hydra.launcher.ray.init.num_cpus=2",)),
}


def table(folder):
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def held(folder):
    """The processes that write into run folders."""
    found = [json.loads(path.read_text()) for path in folder.glob("*/run.lock")]
    return [one["pid"] for one in found if os.path.exists(f"/proc/{one['pid']}")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_six_runs_one_fails_a_kill_and_a_second_start(tmp_path, launcher):
    package, more = LAUNCHERS[launcher]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    sweep = tmp_path / "sweep"
    argv = ("-m", *SETTINGS, f"admm.rho={','.join(RHOS)}", f"hydra.sweep.dir={sweep}", f"hydra/launcher={launcher}")
    child = StartedSmall(*argv, *more, log=tmp_path / "first")
    assert wait(child, lambda: bool(finished(sweep))) is None, child.log.read_text()
    child.kill(signal.SIGTERM)
    for job in (sweep / ".submitit").glob("[0-9]*"):  # as docs/sweeps.md says
        with suppress(ProcessLookupError):
            os.kill(int(job.name), signal.SIGINT)
    time.sleep(2)
    for _ in range(600):  # jobs are processes of their own, which outlive the sweep
        if not (running := held(sweep)):
            break
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    wait(child)
    done = {path: path.stat().st_mtime_ns for path in finished(sweep)}
    assert 0 < len(done) < 5

    again = StartedSmall(*argv, *more, log=tmp_path / "second")
    assert wait(again) == 2, again.log.read_text()
    rows = table(sweep)
    assert [float(one["admm.rho"]) for one in rows] == [float(rho) for rho in RHOS]
    assert [one["state"] for one in rows] == ["finished", "finished", "failed", *["finished"] * 3]
    failed = next(path for path in sweep.iterdir() if path.name.startswith("2_"))
    assert "TrainingError" in (failed / "error.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished runs are not repeated"
    names = sorted(path.name for path in sweep.glob("[0-9]_*"))
    assert [name.partition("-")[0] for name in names] == [f"{k}_admm.rho" for k in range(6)], "what is swept, no more"
    assert (sweep / "sweep.html").exists()
