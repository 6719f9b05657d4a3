"""docs/pruning.md: its lines run and give its table. It needs torch-pruning: ``uv run --with torch-pruning``."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_costs_of_the_page_are_those_of_its_lines():
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    names = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    small, x = names["small"], names["x"]
    assert small.eval()(x).shape == (2, 10)
    assert sum(p.numel() for p in small.parameters()) == names["costs"]["pruned, decomposed"][0]
    for words, (params, macs) in names["costs"].items():
        assert re.search(rf"\| {words}.* \| {params / 1e6:.2f} M \| {macs / 1e6:.1f} M \|", PAGE), words
    assert torch.isfinite(small(x)).all()
