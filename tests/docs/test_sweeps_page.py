"""docs/sweeps.md: commands that are accepted as they stand, and names that exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from hodec.cli import main as cli
from hodec.errors import ConfigError
from hodec.experiment.config.objectives import OBJECTIVES
from hodec.experiment.config.overrides import check_overrides
from hodec.experiment.report.table import TABLES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
LINES = re.findall(r"^(?:python|hodec) .*$", PAGE.replace("\\\n", " "), flags=re.MULTILINE)
COMMANDS = [shlex.split(line, comments=True) for line in LINES]
# Launcher -> the plugin that it needs, which is in no extra that developers have.
PLUGINS = dict.fromkeys(("local_jobs", "slurm_jobs"), "hydra_submitit_launcher") | {"ray_jobs": "hydra_ray_launcher"}
RUNS = [words[2:] for words in COMMANDS if words[0] == "python"]
REPORTS = [words[1:] for words in COMMANDS if words[0] == "hodec"]


# Two objectives take what one takes, and seconds more.
@pytest.mark.parametrize(
    "argv",
    [pytest.param(one, marks=[pytest.mark.slow] if "hydra/sweeper=accuracy_macs" in one else []) for one in RUNS],
    ids=" ".join,
)
def test_commands_of_train_py_are_accepted(argv):
    launcher = next((word.partition("=")[2] for word in argv if word.startswith("hydra/launcher=")), "")
    if launcher in PLUGINS and importlib.util.find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is None:
        one = [word for word in argv if "," not in word]  # of a sweep, which takes longer
        with pytest.raises(ConfigError, match=r"it needs the extra: pip install 'hodec\[(slurm|ray)\]'"):
            check_overrides(one, ROOT / "conf")
    else:
        check_overrides(argv, ROOT / "conf")


def test_every_launcher_of_conf_is_on_the_page():
    launchers = {path.stem for path in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml")}
    assert launchers == PLUGINS.keys()
    assert all(f"hydra/launcher={name}" in PAGE for name in launchers)


def test_commands_of_hodec_report_are_accepted():
    assert [len(cli.parser().parse_args(argv).path) for argv in REPORTS] == [1, 2]


def test_every_objective_and_every_table_is_named():
    assert all(f"`{name}`" in PAGE for name in OBJECTIVES)
    assert all(f"`sweep.{ending}`" in PAGE for ending in TABLES)
