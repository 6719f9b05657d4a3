"""Draw differences.png from the rows beside this file: points above direct truncation with SGD, over the epochs."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

HERE = Path(__file__).parent
IMAGES = 45_000
# file of rows -> its base, images in all of a run
TABLES = {
    "steps_150.csv": ("direct + SGD", 150 * 64),
    "regimes/methods_150.csv": ("tucker + SGD", 150 * 64),
    "steps_600.csv": ("direct + SGD", 600 * 64),
    "regimes/methods.csv": ("tucker + SGD", 600 * 64),
    "regimes/ten_epochs.csv": ("direct + SGD", 10 * IMAGES),
    "regimes/better_teacher.csv": ("tucker + SGD", 5 * IMAGES),
}
# Tables of bfloat16, from a start of 77.29 %; of float32, from one of 76.88 %, which teaches; and from one of 81.78 %.
BFLOAT16 = ("steps_150.csv", "steps_600.csv")
FLOAT32 = ("regimes/methods_150.csv", "regimes/methods.csv", "regimes/ten_epochs.csv")
TEACHER = ("regimes/better_teacher.csv",)
STYLES = {BFLOAT16: "o--", FLOAT32: "o-", TEACHER: "*"}
# what it is called -> what the rows call it, the tables it is taken from, colour
ARMS = {
    "cp3, Muon, features": (("cp3 + Muon, features",), FLOAT32, "#7c3aed"),
    "cp3, SGD": (("cp3 + SGD",), FLOAT32, "#0891b2"),
    "spatial_svd, SGD": (("spatial_svd + SGD",), FLOAT32, "#65a30d"),
    "tucker, Muon, features": (("tucker + Muon, features", "Muon + features"), FLOAT32, "#b45309"),
    "the same in bfloat16, from another start": (("Muon + features",), BFLOAT16, "#f59e0b"),
    "tucker, projected all the way, likewise": (("projected",), BFLOAT16, "#0f766e"),
    "tucker, half ADMM, half SGD, likewise": (("half ADMM, half SGD",), BFLOAT16, "#1d4ed8"),
    "cp3, Muon, features, from a better teacher": (("cp3 + Muon, features",), TEACHER, "#7c3aed"),
    "cp3, SGD, from a better teacher": (("cp3 + SGD",), TEACHER, "#0891b2"),
}


def tested(name: str) -> dict[str, dict[int, float]]:
    """Test accuracies in %: arm -> seed -> of its end."""
    found: dict[str, dict[int, float]] = {}
    with (HERE / name).open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            if row["compressed_test_accuracy"]:
                found.setdefault(row["arm"], {})[int(row["seed"])] = 100 * float(row["compressed_test_accuracy"])
    return found


def differences(arms: Sequence[str], tables: Sequence[str]) -> list[tuple[float, float, float]]:
    """Epochs of all images, mean difference to the base in pairs of a seed, half of its 95 % interval; by epochs."""
    found = []
    for name in tables:
        (base, images), accuracies = TABLES[name], tested(name)
        for arm in accuracies.keys() & {*arms}:
            apart = [value - accuracies[base][seed] for seed, value in accuracies[arm].items()]
            half = stats.t.ppf(0.975, len(apart) - 1) * statistics.stdev(apart) / len(apart) ** 0.5
            found.append((images / IMAGES, statistics.mean(apart), float(half)))
    return found


def main() -> None:
    """Write differences.png."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.axhline(0, color="#6b7280")
    for k, (label, (arms, tables, colour)) in enumerate(ARMS.items()):
        epochs, mean, half = map(np.array, zip(*differences(arms, tables), strict=True))
        style = {"color": colour, "fmt": STYLES[tables], "capsize": 3, "markersize": 12 if tables == TEACHER else 6}
        axes.errorbar(epochs * 1.015 ** (k - 4), mean, yerr=half, label=label, **style)
        for at in np.flatnonzero(mean[:-1] * mean[1:] < 0):  # on a straight line in the logarithm of the epochs
            share = mean[at] / (mean[at] - mean[at + 1])
            even = epochs[at] * (epochs[at + 1] / epochs[at]) ** share
            axes.plot(even, 0, marker="D", color=colour, markersize=9)
            axes.annotate(
                f"break-even, about {even:.0f} epochs", (even, 0), (-150, -18), textcoords="offset points", color=colour
            )
    axes.set(xscale="log", xlabel="epochs of all images, 16 x 16 pixels", ylabel="points above tucker, SGD")
    title = "ResNet-20 at a quarter of its multiply-adds, three seeds, intervals of 95 % over seeds"
    axes.set_title(title, fontsize=10)
    axes.set_xticks([0.2, 1, 10], ["0.2", "1", "10"])
    axes.set_ylim(-1.5, 8.5)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(HERE / "differences.png", dpi=110)


if __name__ == "__main__":
    main()
