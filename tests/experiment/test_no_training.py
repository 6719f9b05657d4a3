"""experiments/no_training_cifar10_jpeg: every way makes a net, and its page says what its rows say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hodec.models.resnet_cifar import CifarResNet

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "no_training_cifar10_jpeg"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("no_training_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names of its annotations
    spec.loader.exec_module(module)
    return module


def test_every_way_makes_a_net_at_the_cut_and_rows_are_not_made_again(script: ModuleType, generator):
    torch.manual_seed(0)
    net = CifarResNet(1).eval()
    x = torch.randn(24, 3, 32, 32, generator=generator)
    data, test = [x[:8], x[8:16]], script.Images(x[16:], net(x[16:]).argmax(1))
    ways = ["weights only", "+ refit (ADMM)", "+ output gradients", "+ methods mixed"]  # what the others are made of
    rows = list(script.rows_of("resnet20", net, data, test, cuts=[0.5], ways=ways, done=set()))
    assert [row["way"] for row in rows] == [*script.DENSE, *ways]
    assert rows[0]["accuracy"] == 100
    assert all(0.4 < row["macs"] <= 0.5 for row in rows[2:])
    done = {(row["net"], row["cut"], row["way"]) for row in rows}
    assert list(script.rows_of("resnet20", net, data, test, cuts=[0.5], ways=ways, done=done)) == []


def test_the_pages_have_the_table_of_the_rows(script: ModuleType):
    rows = [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()]
    for page in (FOLDER / "README.md", ROOT / "docs" / "calibration.md"):
        assert script.table(rows) in page.read_text()
