"""The table of schedules in docs/admm.md is what the rows of its experiment come to."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_made_of_the_rows():
    spec = importlib.util.spec_from_file_location("schedules_digits", ROOT / "experiments/schedules_digits/run.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [json.loads(line) for line in script.ROWS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(script.SCHEDULES) * 5 * 2
    page = (ROOT / "docs" / "admm.md").read_text(encoding="utf-8")
    for line in script.table(rows).splitlines()[2:]:
        assert line in page
