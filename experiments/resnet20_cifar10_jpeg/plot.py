"""Draw curves.png from the rows beside this file: validation accuracy over the epochs after the shared dense net."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
# file -> what it is called, colour
RUNS = {
    "b_dense_longer": ("B dense, trained on", "#6b7280"),
    "e_direct": ("E truncated directly, taught", "#b45309"),
    "d_admm": ("D ADMM, then taught", "#1d4ed8"),
    "d_admm_scaled": ('D" taught in both, one schedule', "#0f766e"),
    "f_no_dual": ("F as D, without U", "#a21caf"),
    "e_spatial_svd": ("E with spatial_svd", "#dc2626"),
    "d_spatial_svd": ('D" with spatial_svd', "#65a30d"),
    "e_cp3": ("E with cp3", "#7c3aed"),
    "d_cp3": ("D with cp3", "#0891b2"),
}


def rows(name: str) -> list[dict[str, float]]:
    """One per epoch, the shared dense training left out."""
    found = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in found if row["stage"] != "pretrain"]


def main() -> None:
    """Write curves.png."""
    figure, (accuracy, error) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1), layout="constrained")
    for name, (label, colour) in RUNS.items():
        found = rows(name)
        epochs = [k + 1 for k in range(len(found))]
        accuracy.plot(epochs, [100 * row["val/accuracy"] for row in found], label=label, color=colour)
        admm = [(k, row) for k, row in zip(epochs, found, strict=True) if row["stage"] == "admm"]
        if admm:
            at = [k for k, _ in admm]
            cut = [100 * row["admm/truncated_accuracy"] for _, row in admm]
            accuracy.plot(at, cut, color=colour, linestyle="--", linewidth=1)
            error.plot(at, [row["admm/primal_residual"] for _, row in admm], color=colour, label=label)
    accuracy.set(
        xlabel="epochs after the shared dense net", ylabel="validation accuracy, %", xlim=(0, 31), ylim=(60, 90)
    )
    accuracy.set_title("solid: the net being trained, dashed: cut to its ranks now", fontsize=10)
    error.set(xlabel="epochs of ADMM", ylabel="norm(W - Z) / norm(W)", yscale="log")
    accuracy.legend(fontsize=8, loc="lower right")
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
