"""Kill short runs on real digits at random times and start them again until they finish: all end with the same bits.

    python tests/fuzz/kills.py --kills 50 --seed 0

Each start of a run gets one signal at a random moment, anywhere from the reading of its settings to its report. The
same command then goes on. A run that ends before its signal is compared, bit by bit, with one that nothing happened to.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does for the tests

import matplotlib.pyplot  # noqa: E402, F401  (what every run imports, once)
import sklearn.datasets  # noqa: E402, F401
from train_script import Forked, finish, result, rows, wait  # noqa: E402

import hodec.experiment.pipeline  # noqa: E402
import hodec.experiment.report.render  # noqa: E402, F401

# Every phase, the fewest images and epochs that still have a middle, a checkpoint every 30 ms.
SETTINGS = (
    "data=digits", "data.train_fraction=0.15", "data.batch_size=32", "data.augment=true", "data.crop_padding=1",
    "tt_ranks=4", "method.n_modes=1", "pretrain_epochs=1", "dense_epochs=2", "retrain_epochs=2", "bn_batches=2",
    "distill.weight=0.5", "optimizer.lr=0.05", "trainer.accelerator=cpu", "trainer.threads=1",
    "trainer.checkpoint_minutes=0.0005",
)  # fmt: skip

# What such a start may end with: killed, or asked to stop; while it reads its settings, the signal itself ends it.
EXPECTED = {number: (128 + number, -number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
EXPECTED[signal.SIGKILL] = (-signal.SIGKILL,)

# Seconds of a start in which no signal comes; some come while the settings are read.
EARLIEST = 0.05

# Share of the runs that write a report, which takes longer than all the rest.
REPORTS = 0.25


@dataclass
class Count:
    """What happened to all the runs."""

    places: Counter[str] = field(default_factory=Counter)  # signal and phase -> how often
    runs: int = 0
    starts: int = 0

    @property
    def kills(self) -> int:
        """Signals that met a run at work."""
        return self.places.total()


def whole(folder: Path) -> tuple[tuple[str, bytes], list[dict[str, object]], float]:
    """The run that nothing happened to: its result, its rows, its seconds."""
    began = time.monotonic()
    finish(Forked(*SETTINGS, "report=false", f"hydra.run.dir={folder}", log=folder.with_suffix(".log")))
    return result(folder), curves(folder), time.monotonic() - began


def curves(folder: Path) -> list[dict[str, object]]:
    """The rows without the seconds they took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def place(folder: Path) -> str:
    """The last phase that is noted as finished: the next one was at work."""
    state = folder / "run.json"
    done = list(json.loads(state.read_text())["phases"]) if state.exists() else []
    return f"after {done[-1]}" if done else "before the first phase"


def battered(folder: Path, draw: random.Random, signals: Sequence[int], seconds: float, count: Count) -> bool:
    """One run, stopped at random again and again until a start of it ends by itself; returns whether it reports."""
    report, log = draw.random() < REPORTS, folder.with_suffix(".log")
    argv = (*SETTINGS, f"report={str(report).lower()}", f"hydra.run.dir={folder}")
    while True:
        child, number = Forked(*argv, log=log), draw.choice(signals)
        end = time.monotonic() + EARLIEST + seconds * draw.random()
        code = wait(child, lambda end=end: time.monotonic() > end)
        count.starts += 1
        if code is None:
            child.kill(number)
            code = wait(child)
            if code in EXPECTED[number]:
                count.places[f"{signal.Signals(number).name} {place(folder)}"] += 1
                continue
        assert code == 0, f"exit code {code}:\n{log.read_text()[-3000:]}"
        return report


def batter(base: Path, kills: int, seed: int, signals: Sequence[int] = (signal.SIGKILL,)) -> Count:
    """Runs in folders below ``base`` until ``kills`` signals have met them.

    Raises:
        AssertionError: a run that does not go on, leaves a trace, or ends with other bits, rows or no report.
    """
    draw, count = random.Random(seed), Count()
    wanted, lines, seconds = whole(base / "whole")
    while count.kills < kills:
        folder = base / f"run{count.runs}"
        report = battered(folder, draw, signals, seconds, count)
        count.runs += 1
        where = f"seed {seed}, run {count.runs - 1} in {folder}"
        assert result(folder) == wanted, where
        assert curves(folder) == lines, where
        assert (folder / "report.html").exists() == report, where
        assert "Traceback" not in folder.with_suffix(".log").read_text(), where
        assert not list(folder.rglob("*.part")), where
    return count


def main() -> None:
    """Print the count as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["SIGKILL"], choices=[signal.Signals(n).name for n in EXPECTED])
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hodec-kills-") as base:
        count = batter(Path(base), given.kills, given.seed, [signal.Signals[name] for name in given.signals])
    found = {
        "seed": given.seed,
        "kills": count.kills,
        "starts": count.starts,
        "runs, each bit-equal": count.runs,
        "seconds": round(time.monotonic() - began),
        "places": dict(sorted(count.places.items())),
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
