"""docs/scale.md: names that exist, commands that are accepted, and formulas that the measured figures bear out."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import hodec
from hodec.experiment.config.overrides import check_overrides
from hodec.ranks.table import RULES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
RUNS = [shlex.split(line, comments=True) for line in re.findall(r"^(?:hodec|torchrun) .*$", PAGE, flags=re.MULTILINE)]


def test_names_exist():
    names = set(re.findall(r"hodec\.(\w+)[(`.]", PAGE)) - {"json"}
    assert {"make_plan", "convert_shards", "convert_divided", "load", "from_pretrained"} <= names
    assert all(hasattr(hodec, name) for name in names)
    benchmark = importlib.import_module("benchmarks.scale")
    for name in re.findall(r"`(?:python -m benchmarks.scale )?(plan|convert|update|estimate|whole) [a-z0-9]", PAGE):
        assert hasattr(benchmark, name)


def test_the_rules_that_read_weights_and_run_nets_are_named():
    line = PAGE[PAGE.index("`manual` and `ratio`") :]
    reads, runs = (
        line[: line.index("from `weights=`")],
        line[line.index("of the loaded") : line.index("refuse one without")],
    )
    for name, rule in RULES.items():
        assert (f"`{name}`" in runs) == bool(rule.runs_net)
        assert (f"`{name}`" in reads) == (not rule.runs_net)


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_commands_are_accepted(words: list[str]):
    if words[0] == "torchrun":
        words = words[words.index("train.py") - 1 :]
    check_overrides(words[2:], ROOT / "conf")


def test_what_an_update_brings_a_process_is_what_the_formula_says():
    """8 bytes of each number from the other processes, and 12 held of each of its own."""
    rows = re.findall(r"\| `update (\d) 1024 1`.*\| ([\d.]+) MB \| ([\d.]+) MB \|", PAGE)
    assert [row[0] for row in rows] == ["1", "2", "4"]
    for count, held, received in (tuple(map(float, row)) for row in rows):
        assert held == pytest.approx(12 * 10.48576 / count, rel=0.01)
        assert received == pytest.approx(8 * 10.48576 * (count - 1) / count, rel=0.01)
