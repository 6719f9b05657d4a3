"""Run folders made up for the tests: the shape of a ResNet-20 run, with numbers from closed formulas."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

STAGE_EPOCHS = {"pretrain": 12, "admm": 24, "retrain": 16}
WIDTHS = {"layer1": (16, 8, 32), "layer2": (32, 13, 16), "layer3": (64, 20, 8)}  # channels, rank, output size
MODES = {16: [4, 4], 32: [4, 8], 64: [8, 8]}


def make_plan(*, rule: str = "manual") -> dict[str, Any]:
    """A ``plan.json`` with 16 layers factorized by Tucker-like TT ranks and the rest left dense."""
    layers: dict[str, Any] = {}
    for phase, (width, rank, size) in WIDTHS.items():
        for block in range(3):
            for conv in (1, 2):
                before = width * width * 9
                after = 2 * width * rank + rank * rank * 9
                layers[f"{phase}.{block}.conv{conv}"] = {
                    "method": "tt",
                    "layer_type": "conv2d",
                    "shape": [width, width, 3, 3],
                    "modes": {"in": MODES[width], "out": MODES[width]},
                    "ranks": [4, rank, rank, 4],
                    "input_size": [size, size],
                    "output_size": [size, size],
                    "calls": 1,
                    "aliases": [],
                    "notes": [],
                    "params_before": before,
                    "params_after": after,
                    "macs_before": before * size * size,
                    "macs_after": after * size * size,
                }
    layers["layer3.2.conv2"]["notes"] = ["rank 24 clipped to 20 at position 1: the modes allow no more"]
    keys = ("params_before", "params_after", "macs_before", "macs_after")
    rest = {"params_before": 6_826, "params_after": 6_826, "macs_before": 1_123_968, "macs_after": 1_123_968}
    return {
        "format": "hodec-plan",
        "version": 1,
        "rule": rule,
        "method": "tt",
        "layers": layers,
        "skipped": {
            "conv1": "3 input channels: the factorized layer would hold more numbers than the dense one",
            "layer2.0.downsample.0": "kernel 1 x 1 with rank 13: 624 parameters for 512, not worth it",
            "fc": "linear layers are not planned (method.linear = false)",
        },
        "totals": {key: sum(layer[key] for layer in layers.values()) + rest[key] for key in keys},
    }


def _curve(at: float, *, ceiling: float) -> dict[str, float]:
    """Loss and accuracy after ``at`` epochs of learning, without any randomness."""
    wobble = 0.008 * math.sin(2.1 * at)
    value = ceiling - (ceiling - 0.1) * math.exp(-at / 4) + wobble
    return {
        "train/loss": 2.2 * math.exp(-at / 5) + 0.05,
        "train/accuracy": min(1.0, value + 0.012),
        "val/loss": 2.1 * math.exp(-at / 5) + 0.11 - wobble,
        "val/accuracy": value,
    }


def _admm(epoch: int, names: list[str], *, decay: float, grow: bool) -> dict[str, Any]:
    left = math.exp(epoch / decay) if grow else math.exp(-epoch / decay)
    layers = {
        name: {
            "rho": 0.011 * (1 + 0.04 * at) * (1 + epoch / 12),
            "primal_residual": (0.30 + 0.5 * math.sin(at + 1) ** 2) * left + 0.004,
            "dual_residual": (0.05 + 0.004 * at) * math.exp(-epoch / (decay + at / 3)),
        }
        for at, name in enumerate(names)
    }
    residual = 0.62 * left + 0.005
    return {
        "admm/rho": 0.014 * (1 + epoch / 12),
        "admm/pull": 0.8,
        "admm/primal_residual": residual,
        "admm/dual_residual": 0.09 * math.exp(-epoch / (decay + 2)),
        "admm/truncation_error": 0.9 * residual,
        "admm/truncated_accuracy": 0.1 + 0.86 * (1 - min(1.0, residual)) ** 2,
        "admm/layers": layers,
    }


def make_rows(
    phases: dict[str, int], names: list[str], *, decay: float = 5.0, grow: bool = False
) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` for the given numbers of epochs."""
    rows: list[dict[str, Any]] = []
    for phase, epochs in phases.items():
        for epoch in range(epochs):
            ahead = {"pretrain": 0, "admm": 9, "retrain": 7}[phase]
            row = {"phase": phase, "epoch": epoch, "lr": 0.05 * (1 - epoch / epochs), "seconds": 3.4}
            row |= _curve(epoch + 1 + ahead, ceiling=0.972)
            if phase == "admm":
                row |= _admm(epoch, names, decay=decay, grow=grow)
            rows.append(row)
    return rows


def make_outcome(plan: dict[str, Any], *, status: str = "converged", final: float = 0.969) -> dict[str, Any]:
    """A ``metrics.json`` that agrees with the plan."""
    totals = plan["totals"]
    small = {"params": totals["params_after"], "macs": totals["macs_after"]}
    dense = {"params": totals["params_before"], "macs": totals["macs_before"]}
    return {
        "dense": {"test_accuracy": 0.972, **dense},
        "truncated": {"test_accuracy": 0.9583, "test_accuracy_raw": 0.9417, **small},
        "compressed": {"test_accuracy": final, **small},
        "reduction": {cost: 1 - small[cost] / dense[cost] for cost in small},
        "admm": {"status": status, "primal_residual": 0.0102},
        "conversion": {name: 0.004 + 0.0007 * at for at, name in enumerate(plan["layers"])},
        "seed": 0,
        "versions": {"hodec": "0.1.0", "python": "3.11.7", "torch": "2.15.0"},
        "command": "python train.py model=resnet20 data=digits 'tt_ranks=[8,13,20]' admm.rho=auto",
        "seconds": {"pretrain": 41.2, "admm": 96.0, "retrain": 52.75},
        "data": {"name": "digits", "classes": 10, "images": {"train": 1294, "validation": 144, "test": 359}},
    }


def make_config(**changes: Any) -> dict[str, Any]:
    """A ``config.yaml``; a change ``admm__rho=0.1`` sets ``admm.rho``."""
    config: dict[str, Any] = {
        "model": {"name": "resnet20", "num_classes": 10},
        "data": {"name": "digits", "batch_size": 64},
        "method": {"name": "tt"},
        "ranks": {"name": "manual", "value": [8, 13, 20]},
        "admm": {"rho": "auto", "pull": 0.8, "update_every": "epoch"},
        "dense_epochs": 12,
        "retrain_epochs": 16,
        "seed": 0,
    }
    for dotted, value in changes.items():
        *groups, key = dotted.split("__")
        inner = config
        for group in groups:
            inner = inner[group]
        inner[key] = value
    return config


def write_files(folder: Path, **files: Any) -> Path:
    """Write ``config``, ``plan``, ``rows``, ``outcome`` where given: dictionaries as they stand in a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if "config" in files:
        (folder / "config.yaml").write_text(yaml.safe_dump(files["config"], sort_keys=False), encoding="utf-8")
    if "plan" in files:
        (folder / "plan.json").write_text(json.dumps(files["plan"]), encoding="utf-8")
    if "rows" in files:
        lines = "".join(json.dumps(row) + "\n" for row in files["rows"])
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if "outcome" in files:
        (folder / "metrics.json").write_text(json.dumps(files["outcome"]), encoding="utf-8")
    return folder


def write_run(folder: Path, *, phases: dict[str, int] | None = None, finished: bool = True, **options: Any) -> Path:
    """A whole run folder.

    ``options``: ``config`` (a dictionary), ``plan``, ``status``, ``final`` (accuracy), ``decay``, ``grow``.
    """
    plan = options.get("plan") or make_plan()
    epochs = STAGE_EPOCHS if phases is None else phases
    curve = {key: options[key] for key in ("decay", "grow") if key in options}
    rows = make_rows(epochs, list(plan["layers"]), **curve)
    files: dict[str, Any] = {"config": options.get("config") or make_config(), "plan": plan, "rows": rows}
    if finished:
        files["outcome"] = make_outcome(plan, **{key: options[key] for key in ("status", "final") if key in options})
        residuals = [row["admm/primal_residual"] for row in rows if row["phase"] == "admm"]
        files["outcome"]["admm"]["primal_residual"] = residuals[-1] if residuals else None
    return write_files(folder, **files)


def write_sweep(folder: Path) -> Path:
    """A multirun over rho: three runs, one that was killed, one that is broken, one that never began."""
    for at, (rho, decay) in enumerate({0.001: 30.0, 0.01: 8.0, 0.1: 4.0}.items()):
        config = make_config(admm__rho=rho)
        write_run(folder / str(at), config=config, decay=decay, final=0.95 + 0.01 * at, status="epochs ended")
    write_run(folder / "3", config=make_config(admm__rho=1.0), phases={"pretrain": 12, "admm": 5}, finished=False)
    broken = write_run(folder / "4", config=make_config(admm__rho=10.0))
    (broken / "plan.json").write_text('{"format": "hodec-plan", "layers": {', encoding="utf-8")
    (folder / "10" / ".hydra").mkdir(parents=True)
    (folder / "10" / ".hydra" / "overrides.yaml").write_text("- admm.rho=abc\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_folder() -> Callable[..., Path]:
    """``write_run``: makes a run folder."""
    return write_run


@pytest.fixture(scope="session")
def files_in() -> Callable[..., Path]:
    """``write_files``: writes only the given files."""
    return write_files


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    """A multirun folder with good, killed, broken and never started runs."""
    return write_sweep(tmp_path / "multirun")
