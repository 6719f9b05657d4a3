"""Keep what the picture of the first page shows of two runs: ``python docs/figures/read_runs.py ADMM_RUN OFF_RUN``.

The runs are ``python train.py seed=0 trainer.threads=1`` and the same with ``admm=off``; ``runs.json`` is written
beside this file.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
LAYER = "layer3.0.conv2"  # 64 to 64 channels, 3x3
DENSE = {"admm": "admm", "off": "dense"}  # run -> the phase that its dense net came from


def spectrum(run: Path, phase: str) -> list[float]:
    """Singular values of the layer's weight (O, I K) over the largest one, as the dense net ended its training."""
    weight = load_file(run / "phases" / f"{phase}.safetensors")[f"{LAYER}.weight"]
    values = torch.linalg.svdvals(weight.double().flatten(1))
    return [round(float(value), 6) for value in values / values[0]]


def facts(run: Path, phase: str) -> dict[str, object]:
    """Accuracies (0 to 1) in the order in which they come about, costs before and after, and the spectrum."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    dense, truncated, small = (metrics[name] for name in ("dense", "truncated", "compressed"))
    return {
        "accuracy": [
            dense["test_accuracy"],
            truncated["test_accuracy_raw"],
            truncated["test_accuracy"],
            small["test_accuracy"],
        ],
        "params": [dense["params"], small["params"]],
        "macs": [dense["macs"], small["macs"]],
        "spectrum": spectrum(run, phase),
    }


def main() -> None:
    """Write runs.json."""
    admm, off = map(Path, sys.argv[1:])
    plan = json.loads((admm / "plan.json").read_text(encoding="utf-8"))["layers"][LAYER]
    found = {"layer": LAYER, "rank": plan["ranks"][2]}
    found |= {name: facts(run, DENSE[name]) for name, run in (("admm", admm), ("off", off))}
    (HERE / "runs.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
