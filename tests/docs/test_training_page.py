"""docs/training.md: its loop runs, its settings exist, its defaults are those of the code."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hodec
from hodec.experiment.config.groups import groups
from hodec.options import settings_of

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def loss_after(steps: int) -> float:
    """The loss of the last of so many steps of the page's loop."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 6))
    x = torch.randn(8, 3, 8, 8)
    plan = hodec.make_plan(dense, 3, method="tucker", example_input=x)
    loader = [(x, torch.arange(8) % 6)] * steps
    names = {"hodec": hodec, "torch": torch, "F": F, "dense": dense, "plan": plan, "loader": loader}
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    exec(code, names)
    assert not any(module._forward_hooks for module in dense.modules())
    return float(names["loss"].detach())


def test_the_loop_runs_and_learns():
    assert loss_after(steps=40) < 0.8 * loss_after(steps=1)


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
