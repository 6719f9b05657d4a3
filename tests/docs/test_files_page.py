"""docs/files.md: every command and option on the page is one that hodec takes."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

import hodec
from hodec.cli import main as cli
from hodec.cli.decompose import check_data_options
from hodec.cli.rule_options import OFFERED, method_from, rule_from
from hodec.fusion.search import TARGETS
from hodec.onnx_graph.graph import OLDEST

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL))
COMMANDS = [shlex.split(line, comments=True) for line in BLOCKS.splitlines() if line]
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_commands_are_accepted(argv):
    assert argv[0] == "hodec"
    options = cli.parser().parse_args(argv[1:])
    if options.verb == "decompose" and not options.plan and not options.preset:
        assert rule_from(options).name in OFFERED
        assert method_from(options)["method"] in hodec.METHODS
    if options.verb == "decompose" and not options.preset:  # which stands for a method and a rule
        check_data_options(options)


def test_options_exist():
    known = {flag for verb in cli.VERBS for flag in _flags(verb)}
    assert set(re.findall(r"`(--[a-z0-9-]+)", PAGE)) <= known


def _flags(verb):
    import argparse

    parser = argparse.ArgumentParser()
    cli.verb_module(verb).add_arguments(parser)
    parser.add_argument("--json")  # of every verb
    return [flag for action in parser._actions for flag in action.option_strings]


def test_python_is_python_with_arguments_that_exist():
    calls = []
    for script in SCRIPTS:
        compile(script, "files.md", "exec")
        calls += re.findall(r"hodec\.(\w+)\(([^)\n]*)\)", script)
    for name, text in calls:
        taken = inspect.signature(getattr(hodec, name)).parameters
        assert set(re.findall(r"(\w+)=", text)) <= set(taken), name
    assert {name for name, _ in calls} >= {"fuse", "to_onnx", "to_program", "save", "load", "convert"}


def test_numbers_are_those_of_the_code():
    assert f"Operators of version {OLDEST} up" in PAGE
    assert all(f'target="{target}"' in PAGE for target in TARGETS)
