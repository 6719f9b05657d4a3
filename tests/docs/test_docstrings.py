"""The examples in the docstrings of public names run as they stand; ``docs/api.md`` shows all of these names."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hodec
from hodec.ranks import RULES

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
#: Names that nothing small and quick shows, and where they are shown instead.
ELSEWHERE = {
    "AdmmTrainerCallback": "docs/loops.md",
    "compress_file": "notebooks/smaller_file.ipynb",
    "convert_divided": "docs/scale.md",
    "convert_shards": "docs/scale.md",
    "from_pretrained": "docs/files.md",
}
NAMES = sorted(set(hodec._HOMES) - {"__version__", "formats", "ranks"} - set(ELSEWHERE))
SLOW = ("decompose_file", "to_onnx", "to_program")  # a second of export each


def examples(subject: object) -> doctest.DocTest:
    """The examples of a docstring, with the names that docs/api.md says they begin with."""
    names = {"torch": torch, "nn": nn, "hodec": hodec}
    return doctest.DocTestParser().get_doctest(inspect.getdoc(subject) or "", names, repr(subject), None, 0)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES])
def test_examples_of_public_names_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = examples(getattr(hodec, name))
    assert found.examples, f"hodec.{name} has no example"
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(found, out=told.append)
    assert told == []


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_shown_where_they_are(rule):
    assert RULES[rule].__name__ in re.findall(r"^::: hodec\.ranks\.[\w.]+\.(\w+)$", API, re.MULTILINE)


def test_the_api_page_shows_every_public_name_from_its_home():
    shown = {dotted.rpartition(".")[2]: dotted for dotted in re.findall(r"^::: (\S+)$", API, re.MULTILINE)}
    for home, _, name in (dotted.rpartition(".") for dotted in shown.values()):
        source = importlib.util.find_spec(home).origin  # not imported: one needs transformers
        assert re.search(rf"^(class|def) {name}\b", Path(source).read_text(encoding="utf-8"), re.MULTILINE), name
    assert {*NAMES, *ELSEWHERE} - {"METHODS"} <= set(shown)


@pytest.mark.parametrize(("name", "place"), ELSEWHERE.items())
def test_what_has_no_example_is_shown_elsewhere(name, place):
    assert name in (Path(__file__).parents[2] / place).read_text(encoding="utf-8")
