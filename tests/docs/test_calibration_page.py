"""docs/calibration.md: its Python runs as it stands, one block after the other."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hodec

PAGE = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_python_runs_as_it_stands():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.Flatten(), nn.Linear(384, 6)
    ).eval()
    net[3].weight.data = (torch.randn(24, 2) @ torch.randn(2, 216)).reshape(24, 24, 3, 3) / 20  # something to be won
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    plan = hodec.make_plan(net, 4, method="svd", example_input=batches[0])

    def accuracy(one: nn.Module, held: list[torch.Tensor] = batches) -> float:
        return float(sum((one(x).argmax(1) == net(x).argmax(1)).float().mean() for x in held)) / len(held)

    names = {"hodec": hodec, "net": net, "plan": plan, "batches": batches, "accuracy": accuracy}
    code = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(code) == 2
    for block in code:
        exec(compile(block, "docs/calibration.md", "exec"), names)
    assert names["small"](batches[0]).shape == (16, 6)
    assert names["near"] is not net
    assert accuracy(names["near"]) > 1 / 6
