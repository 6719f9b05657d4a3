"""Processes that divide one net by `fully_shard` train, convert and resume as one process that has it whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from divided_processes import EPOCHS, Run
from torch.testing import assert_close

from hodec.admm.division import Division, is_divided, part_of, turns

SCRIPT = Path(__file__).parent / "divided_processes.py"


def processes(folder: Path, count: int, way: str, kind: str, stop: int = 0) -> list[dict]:
    """What each process holds at the end; after epoch ``stop`` the run goes on in new objects, from a checkpoint."""
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPT.parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(SCRIPT), str(count), way, kind, str(folder), str(stop)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def alone(kind: str) -> dict:
    run = Run("whole", kind)
    for _ in range(EPOCHS):
        run.epoch()
    return run.held()


# Gradients are means of the processes' means, which rounds otherwise than one mean: a few units of the last place,
# 2^-23 of a number, at each of 16 steps. Adam divides gradients by their size, so that those near 0 turn over.
TOLERANCE = {"pulled": 1e-4, "projected": 1e-4, "iterated": 1e-3, "moved": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "way", "kind"),
    [
        (2, "ddp", "pulled"),
        (4, "ddp", "pulled"),
        (2, "fsdp", "pulled"),
        (4, "fsdp", "pulled"),
        (4, "hsdp", "pulled"),
        (2, "fsdp", "moved"),
        (2, "fsdp", "projected"),
        (2, "fsdp", "iterated"),
    ],
)
def test_processes_train_and_convert_as_one(tmp_path, count: int, way: str, kind: str):
    found, expected = processes(tmp_path / "run", count, way, kind), alone(kind)
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=0)
    scale = TOLERANCE[kind]
    first = {
        key: {name.removeprefix("module."): one for name, one in found[0][key].items()} for key in ("weights", "small")
    }
    assert_close(first["weights"], expected["weights"], rtol=scale, atol=scale)
    assert_close(first["small"], expected["small"], rtol=scale, atol=scale)
    for mine, theirs in zip(found[0]["reports"], expected["reports"], strict=True):
        assert mine == pytest.approx(theirs, rel=10 * scale, abs=1 / 32 if kind == "moved" else scale)


@pytest.mark.slow
def test_a_checkpoint_of_divided_weights_goes_on_exactly(tmp_path):
    straight = processes(tmp_path / "straight", 2, "fsdp", "pulled")
    resumed = processes(tmp_path / "resumed", 2, "fsdp", "pulled", stop=2)
    assert_close(resumed, straight, rtol=0, atol=0)


def test_whole_weights_are_not_divided():
    weights = {"a": torch.ones(2, 2)}
    division = Division(weights, torch.nn.Linear(2, 2))
    assert not division
    assert not is_divided(weights["a"])
    assert part_of(weights["a"]) is weights["a"]
    assert division.added({"a": [1.0, 2.0]}) == {"a": [1.0, 2.0]}


def test_turns_hold_no_more_than_the_largest_layer():
    sizes = {"a": 9, "b": 4, "c": 5, "d": 3, "e": 7}
    found = list(turns([["a", "d", "b"], ["e", "c"]], sizes))
    assert found == [[["a"], ["e"]], [["d", "b"], ["c"]]]
    assert list(turns([[], []], {})) == []
