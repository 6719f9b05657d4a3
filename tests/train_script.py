"""`python train.py ...` in a child process: forked, which saves the time of the imports, or started anew.

In all but ``Started``, resnet20 has one block a stage, 8 layers in all, which saves more than half of the time.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hodec.experiment.main  # noqa: F401  (with Hydra: once, before any fork)
from hodec.models import resnet_cifar

ROOT = Path(__file__).parent.parent
DEADLINE = 240  # seconds that a child may take on a busy machine

# More images than those of tiny_runs, so that there is a middle of an epoch to be killed in.
SETTINGS = (
    "data=fake", "data.fake_size=150", "data.fake_classes=4", "data.image_size=8", "data.batch_size=16",
    "data.augment=true", "data.crop_padding=1", "data.flip=true", "tt_ranks=4", "method.n_modes=1", "dense_epochs=3",
    "retrain_epochs=3", "bn_batches=4", "optimizer.lr=0.05", "trainer.accelerator=cpu", "trainer.threads=1",
    "report=false",
)  # fmt: skip


class Forked:
    """train.py in a fork of this process."""

    def __init__(self, *argv: str, log: Path) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = _run_here(argv, log)
            finally:
                os._exit(code)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)


def _run_here(argv: tuple[str, ...], log: Path) -> int:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _train(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _train(argv: Sequence[str]) -> None:
    resnet_cifar.DEPTHS["resnet20"] = 1
    sys.argv = [str(ROOT / "train.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Started:
    """train.py in a new interpreter."""

    script = ROOT / "train.py"

    def __init__(self, *argv: str, log: Path) -> None:
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("ab") as out:
            command = [sys.executable, str(self.script), *argv]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=log.parent)

    def kill(self, number: int) -> None:
        self.process.send_signal(number)

    def poll(self) -> int | None:
        return self.process.poll()


class StartedSmall(Started):
    """The same with the net of ``Forked``; for one process only, as Lightning starts further ones from train.py."""

    script = Path(__file__)


Child = Forked | Started


def wait(child: Child, until: Callable[[], bool] = lambda: False, seconds: float = DEADLINE) -> int | None:
    """Wait for the child's end (its exit code) or for ``until`` (None)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        code = child.poll()
        if code is not None:
            return code
        if until():
            return None
        time.sleep(0.005)
    child.kill(signal.SIGKILL)
    raise AssertionError(f"the run did not end in {seconds} s:\n{child.log.read_text()[-3000:]}")


def rows(folder: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def kill_within(child: Child, folder: Path, phase: str, *, after: int = 1, number: int = signal.SIGKILL) -> int:
    """Send a signal in the middle of the epoch that follows ``after`` epochs of a phase; returns the exit code."""

    def epochs() -> list[dict[str, Any]]:
        return [row for row in rows(folder) if row["phase"] == phase]

    code = wait(child, lambda: len(epochs()) >= after)
    assert code is None, f"it ended with {code} before it could be killed:\n{child.log.read_text()[-3000:]}"
    time.sleep(0.5 * epochs()[-1]["seconds"])
    child.kill(number)
    code = wait(child)
    assert code is not None
    assert len(epochs()) < 3, "it was killed too late for this test"
    return code


def finished(sweep: Path) -> list[Path]:
    """The results of a sweep's runs that count as finished, which is noted just after they are written."""
    noted = [path for path in sweep.glob("*/run.json") if '"evaluate"' in path.read_text()]
    return [path.with_name("metrics.json") for path in noted]


def finish(child: Child) -> None:
    code = wait(child)
    assert code == 0, f"exit code {code}:\n{child.log.read_text()[-3000:]}"


def result(folder: Path) -> tuple[str, bytes]:
    """What must be equal bit for bit."""
    digest = json.loads((folder / "metrics.json").read_text())["weights_sha256"]
    return digest, (folder / "compressed.safetensors").read_bytes()


if __name__ == "__main__":
    _train(sys.argv[1:])
