"""500 short epochs of ADMM, watched from outside: neither the memory of the process nor its files may grow.

    python tests/fuzz/soak.py --epochs 500 --figure docs/soak.png

The run is one of ``train.py`` on made-up images. After each epoch the resident memory of its process is read, and the
files of its folder are counted; the rows of its curves are the only thing that gets longer.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does for the tests

from train_script import SETTINGS, Forked, wait  # noqa: E402

CURVES = ("metrics.jsonl", "metrics.csv", "train.log")


@dataclass
class Look:
    """What there is after an epoch; memory and files in bytes."""

    epoch: int
    memory: int
    files: int
    bytes: int


def look(pid: int, folder: Path, epoch: int) -> Look:
    """The state of a run at work."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    sizes = []
    for path in folder.rglob("*"):
        try:
            if path.is_file() and path.name not in CURVES and path.suffix != ".part":
                sizes.append(path.stat().st_size)
        except FileNotFoundError:  # moved over another one meanwhile
            continue
    return Look(epoch, pages * 4096, len(sizes), sum(sizes))


def soak(folder: Path, epochs: int) -> list[Look]:
    """One look after each epoch that was seen, of a run of so many epochs under ADMM."""
    settings = [word for word in SETTINGS if not word.startswith(("dense_epochs", "retrain_epochs"))]
    argv = [*settings, f"dense_epochs={epochs}", "retrain_epochs=0", f"hydra.run.dir={folder}"]
    child = Forked(*argv, log=folder.with_suffix(".log"))
    looks, path = list[Look](), folder / "metrics.jsonl"

    def watch() -> bool:
        count = path.read_bytes().count(b"\n") if path.exists() else 0
        if count and (not looks or looks[-1].epoch < count):
            looks.append(look(child.pid, folder, count))
            time.sleep(0.02)  # most of the time is the run's
        return False

    code = wait(child, watch, seconds=3600)
    assert code == 0, child.log.read_text()[-3000:]
    return looks


def growth(looks: list[Look]) -> dict[str, float]:
    """Memory of the last fifth against the second one, as the median: MiB, and MiB for 100 epochs; and files."""
    fifth = looks[-1].epoch // 5
    early = [one for one in looks if fifth < one.epoch <= 2 * fifth]
    late = [one for one in looks if one.epoch > 4 * fifth]
    more = (median(one.memory for one in late) - median(one.memory for one in early)) / 2**20
    return {
        "epochs": looks[-1].epoch,
        "looks": len(looks),
        "MiB": median(one.memory for one in late) / 2**20,
        "MiB more": more,
        "MiB for 100 epochs": more / (3 * fifth) * 100,
        "files more": max(one.files for one in late) - max(one.files for one in early),
        "bytes more": max(one.bytes for one in late) - max(one.bytes for one in early),
    }


def draw(looks: list[Look], path: Path) -> None:
    """Memory and files by epoch, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True, layout="constrained")
    epochs = [one.epoch for one in looks]
    above.plot(epochs, [one.memory / 2**20 for one in looks], lw=1)
    above.set_ylabel("resident memory, MiB")
    above.set_ylim(0, 1.2 * max(one.memory for one in looks) / 2**20)
    below.plot(epochs, [one.bytes / 2**20 for one in looks], lw=1)
    below.set_ylabel("files but curves, MiB")
    below.set_ylim(0, 1.2 * max(one.bytes for one in looks) / 2**20)
    below.set_xlabel("epoch under ADMM")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Print the growth as JSON, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--looks", type=Path, help="where to write every look, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hodec-soak-") as base:
        looks = soak(Path(base) / "run", given.epochs)
    if given.figure:
        draw(looks, given.figure)
    if given.looks:
        given.looks.write_text(json.dumps([asdict(one) for one in looks]))
    sys.stdout.write(json.dumps({key: round(value, 3) for key, value in growth(looks).items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
