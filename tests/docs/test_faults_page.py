"""docs/faults.md and SECURITY.md: each test that they name exists, and they say what the code does."""

import re
from pathlib import Path

import pytest

from hodec.experiment.config.trust import BARRED, FLAG, FREE
from hodec.experiment.redaction import SHORTEST
from hodec.export.checkpoint import MOST_RATIO
from hodec.plan.plan import MOST_INPUT

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(test_\w+)`", PAGE)))


@pytest.fixture(scope="module")
def tests() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def test_each_test_that_the_page_names_exists(tests):
    assert len(NAMED) > 50
    assert [name for name in NAMED if f"def {name}(" not in tests] == []


def test_every_row_of_the_list_has_a_line():
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| ")]
    found = {int(number) for cell in cells for number in re.findall(r"\d+", cell)}
    assert found == set(range(1, 43))


def test_slow_ones_are_said_to_be(tests):
    slow = set(re.findall(r"@pytest\.mark\.slow\n(?:@.*\n)*def (test_\w+)", tests))
    said = set(re.findall(r"`(test_\w+)` \(slow\)", PAGE))
    assert {name for name in NAMED if name in slow} == said


def test_what_a_file_may_set_is_what_the_page_says():
    for key in FREE:
        assert f"`hydra.{key}`" in SECURITY, key
    assert set(BARRED) == {"sweeper.custom_search_space", "sweeper.storage"}
    assert f"{FLAG}`" in SECURITY or f"`{FLAG}" in SECURITY
    assert (MOST_INPUT, MOST_RATIO) == (2**28, 10_000)
    assert f"at least {SHORTEST} characters" in SECURITY
