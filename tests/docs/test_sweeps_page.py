"""docs/sweeps.md: commands that are accepted as they stand, and names that exist."""

import re
import shlex
from pathlib import Path

import pytest

from hodec.cli import main as cli
from hodec.experiment.config.objectives import OBJECTIVES
from hodec.experiment.config.overrides import check_overrides
from hodec.experiment.report.table import TABLES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^(?:python|hodec) .*$", PAGE, flags=re.MULTILINE)]
RUNS = [words[2:] for words in COMMANDS if words[0] == "python"]
REPORTS = [words[1:] for words in COMMANDS if words[0] == "hodec"]


@pytest.mark.parametrize("argv", RUNS, ids=" ".join)
def test_commands_of_train_py_are_accepted(argv):
    check_overrides(argv, ROOT / "conf")


def test_commands_of_hodec_report_are_accepted():
    assert [len(cli.parser().parse_args(argv).path) for argv in REPORTS] == [1, 2]


def test_every_objective_and_every_table_is_named():
    assert all(f"`{name}`" in PAGE for name in OBJECTIVES)
    assert all(f"`sweep.{ending}`" in PAGE for ending in TABLES)
