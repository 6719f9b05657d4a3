"""docs/ranks.md: a section per rule, and commands that are accepted as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from hodec.cli import main as cli
from hodec.cli.rule_options import OFFERED, method_from, rule_flags, rule_from
from hodec.experiment.config.overrides import check_overrides
from hodec.ranks import RULES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True) for line in BLOCKS.splitlines()]
PLANS = [words[2:] for words in COMMANDS if words[:2] == ["hodec", "plan"]]
RUNS = [words[2:] for words in COMMANDS if words[:2] == ["python", "train.py"]]


def test_every_rule_has_a_section_with_its_command():
    assert set(SECTIONS) == set(RULES)
    for rule, text in SECTIONS.items():
        assert ("hodec plan --model" in text) == (rule in OFFERED), rule
        assert "python train.py" in text, rule


def test_every_setting_is_explained():
    for flag in (flag for flags in rule_flags().values() for flag in flags):
        assert f"`{flag}" in PAGE or f"{flag} '" in PAGE, flag


@pytest.mark.parametrize("argv", PLANS, ids=" ".join)
def test_commands_of_hodec_plan_are_accepted(argv):
    options = cli.parser().parse_args(["plan", *argv])
    assert rule_from(options) is not None
    assert method_from(options)["method"]


@pytest.mark.parametrize("argv", RUNS, ids=" ".join)
def test_commands_of_train_py_are_accepted(argv):
    check_overrides(argv, ROOT / "conf")


def test_there_are_commands():
    assert len(PLANS) >= len(OFFERED)
    assert len(RUNS) >= len(RULES)
