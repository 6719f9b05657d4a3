"""docs/training.md: its loop runs, its settings exist, its defaults are those of the code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hodec
from hodec.cost.count import count_cost
from hodec.experiment.config.groups import groups
from hodec.options import settings_of

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
LOOP, FADE, TURNS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def names_after(*codes: str, steps: int) -> dict[str, Any]:
    """What the page's code leaves; a loop has so many steps."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 6))
    x = torch.randn(8, 3, 8, 8)
    plan = hodec.make_plan(dense, 3, method="tucker", example_input=x)
    loader = [(x, torch.arange(8) % 6)] * steps
    names = {"hodec": hodec, "torch": torch, "F": F, "dense": dense, "plan": plan, "loader": loader, "x": x}
    for code in codes:
        exec(code, names)
    assert not any(module._forward_hooks for net in (dense, names["small"]) for module in net.modules())
    return names


def test_the_loop_runs_and_learns():
    losses = [float(names_after(LOOP, steps=steps)["loss"].detach()) for steps in (1, 40)]
    assert losses[1] < 0.8 * losses[0]


def test_the_loop_of_a_net_that_fades_in_runs_and_learns():
    losses = [float(names_after(LOOP, FADE, steps=steps)["loss"].detach()) for steps in (1, 40)]
    assert losses[1] < 0.8 * losses[0]


def test_every_turn_cuts_more():
    names = names_after("trained = []; train = trained.append", TURNS, steps=1)
    trained = names["trained"]
    assert [type(small[0]).__name__ for small in trained] == ["TuckerConv2d"] * 3
    costs = [count_cost(small, names["x"]).macs for small in trained]
    assert costs == sorted(costs, reverse=True)
    assert costs[2] <= 0.42 * count_cost(names["dense"], names["x"]).macs
    assert type(names["net"][0]) is nn.Conv2d


@pytest.mark.parametrize("setting", sorted(set(re.findall(r"`(optimizer|admm)=(\w+)`", PAGE))))
def test_every_option_exists(setting):
    group, name = setting
    assert name in groups()[group]


def test_defaults_are_those_of_the_settings():
    defaults = {name: settings_of(preset.option) for name, preset in groups()["optimizer"].items()}
    rows = dict(re.findall(r"^\| `optimizer\.(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE))
    assert rows["factor_lr"] == str(defaults["muon"]["factor_lr"].default)
    assert rows["retrain_lr"] == (
        f"{defaults['sgd']['retrain_lr'].default}, `scaled_gd` {defaults['scaled_gd']['retrain_lr'].default}"
    )
    assert f"`admm.update_every={settings_of(groups()['admm']['project'].option)['update_every'].default}`" in PAGE
