"""experiments/lstm_text: its script goes on where it was killed, and its page says what its rows say."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "lstm_text"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lstm_text_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names of its annotations
    spec.loader.exec_module(module)
    return module


def test_a_killed_script_ends_with_the_same_rows(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run() -> tuple[str, list[dict[str, object]]]:
        script.main(["--small", "--rows", str(rows)])
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        return capsys.readouterr().out, [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    monkeypatch.setattr(script, "RATES", {arm: rates[:1] for arm, rates in script.RATES.items()})
    rows = tmp_path / "rows.jsonl"
    _, first = run()
    assert {row["arm"] for row in first if "arm" in row} == set(script.RATES)
    kept = [(row.get("arm"), row.get("seed")) for row in first].index(
        ("start", 1)
    )  # killed while the start of seed 1 was trained
    rows.write_text("\n".join(rows.read_text().splitlines()[:kept]) + "\n")
    table, second = run()
    assert second == first
    assert run() == (table, first)
    assert [line.split(" ")[1] for line in table.splitlines()[2:]] == list(script.RATES)


def test_the_page_has_the_table_of_the_rows(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(FOLDER / "rows.jsonl", rows)
    monkeypatch.setattr(script.Experiment, "arm", None)  # nothing is left to train
    assert script.Experiment(script.Setup(), rows).table() in (FOLDER / "README.md").read_text()
