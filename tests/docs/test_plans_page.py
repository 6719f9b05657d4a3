"""docs/plans.md: the names on the page are hodec's, and each form of input in its table works."""

import importlib
import inspect
import re
from pathlib import Path

import hodec

PAGE = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")


def test_names_exist():
    names = set(re.findall(r"`hodec\.([\w.]+)", PAGE))
    assert {"Modes", "FactorizedLayer", "conversion_errors", "reestimate_batchnorm", "LatencyTable"} <= names
    for name in names:
        home, _, last = f"hodec.{name}".rpartition(".")
        assert hasattr(importlib.import_module(home), last), name
        assert home != "hodec" or last in hodec.__all__


def test_the_arguments_of_make_plan_and_attributes_of_a_plan_exist():
    call = re.search(r"hodec\.make_plan\((.*)\)", PAGE).group(1)
    assert set(re.findall(r"(\w+)=", call)) <= set(inspect.signature(hodec.make_plan).parameters)
    fields = set(hodec.Plan.__dataclass_fields__) | set(dir(hodec.Plan))
    assert set(re.findall(r"`plan\.(\w+)", PAGE)) - {"json"} <= fields
