"""docs/extend.md: commands that are accepted as they stand, for a package that has what they name; entry points."""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from own_package import write_package

from hodec import methods, models
from hodec.cli import init
from hodec.experiment.config import trust
from hodec.experiment.config.overrides import check_overrides
from hodec.ranks import table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line)[2:] for line in re.findall(r"^hodec train .*$", PAGE, flags=re.MULTILINE)]
MODULES = {
    "nets": "from pkg.code import Net",
    "data": "from pkg.code import Images, images, test_images\ntrain_set, test_set = images, test_images",
    "rules": "from pkg.code import Share",
    "methods": "from pkg.code import PLAIN as BALANCED",
    "callbacks": "class Note:\n    def __init__(self, every):\n        pass",
    "loggers": "from pkg.code import Lines",
}


@pytest.fixture
def _package(tmp_path, monkeypatch):
    write_package(tmp_path, "pkg", **MODULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(trust.VARIABLE, "")
    yield
    if "plain" in methods.METHODS:
        methods.METHODS.remove("plain")
    for name in [name for name in sys.modules if name.split(".")[0] == "pkg"]:
        del sys.modules[name]


@pytest.mark.usefixtures("_package")
def test_commands_are_accepted():
    """As one, which takes a fourth of the time: each is of another group, but for the two of data."""
    own = [argv for argv in COMMANDS if "my_project" not in argv]  # which is checked in tests/cli/test_init_verb.py
    assert len(own) == 9
    data = [argv for argv in own if "data=functions" in argv]
    assert len(data) == 1
    rest = [word for argv in own if argv not in data for word in argv]
    for argv in (rest, *data):
        check_overrides(trust.take_flag(list(argv)), ROOT / "conf")


def test_entry_points_are_those_of_the_template_and_those_that_are_read():
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    ours = tomllib.loads(text)["project"]["entry-points"]
    template = tomllib.loads((init.TEMPLATE / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    assert ours == template
    assert ours.keys() == {models.ENTRY_POINTS, table.ENTRY_POINTS, methods.GROUP, "hodec.data"}
