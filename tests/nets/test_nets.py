"""What docs/nets.md says is so: each net of its tables is built, planned, converted, trained a step, fused and written.

The nets come from packages that hodec does not need: timm, transformers, diffusers, monai (torchvision is in the extra
``experiment``); a net whose package is missing is skipped. No network is needed, all weights are random.

    pytest -m slow -n 2 tests/nets          # each net writes what it measured to outputs/nets/NAME.json
    python tests/nets/net_page.py           # docs/nets.json and docs/nets.md from these
"""

import json
from pathlib import Path

import pytest
import torch
from net_list import NETS, Net
from net_page import DOCS, MEASURED, file_name, page, seen_share
from net_rows import CHECKS, Row, checked, products_of, row_of, training_step
from torch import Tensor, nn

import hodec
from hodec.inputs import as_input
from hodec.io.atomic import write_json

WRITTEN: dict[str, Row] = {row["net"]: row for row in json.loads((DOCS / "nets.json").read_text(encoding="utf-8"))}


def test_the_page_is_made_of_what_was_measured():
    assert (DOCS / "nets.md").read_text(encoding="utf-8") == page(list(WRITTEN.values()))


def test_all_nets_are_on_the_page():
    assert list(WRITTEN) == list(NETS)
    assert len({file_name(name) for name in NETS}) == len(NETS)


class Attends(nn.Module):
    """Tokens (n, t, 4) that attend to each other; the weight of the last product is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scaled = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.linear(x)
        return (q @ q.mT).softmax(-1) @ q @ (self.scaled * 2)


@pytest.mark.parametrize("tokens", [3, 5])
def test_products_with_weights_and_of_activations_are_told_apart(tokens: int):
    found = products_of(Attends(), as_input(torch.randn(2, tokens, 4)))
    assert found == {"weights": tokens * (4 * 4 + 4 * 3), "activations": 2 * tokens * tokens * 4}


@pytest.mark.parametrize("dead", [True, False])
def test_a_factor_without_a_gradient_is_found(dead: bool):
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    small = hodec.convert(net, hodec.make_plan(net, 3, method="svd", example_input=x))
    if dead:
        small[1].load_factors([torch.zeros_like(factor) for factor in small[1].factors()])
    given = checked(lambda: training_step(small, Net("", (), "", nn.Identity, lambda: x), x))
    assert ("no gradient reaches" in given.get("fault", "")) == dead
    assert ("is" in given) != dead


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETS)
def test_a_net(name: str, tmp_path: Path):
    if missing := NETS[name].missing():
        pytest.skip(f"needs {', '.join(missing)}, which is not installed")
    row = row_of(name, NETS[name], tmp_path)
    write_json(MEASURED / file_name(name), row)
    assert sum(row["seen"]["params"].values()) == pytest.approx(1)
    assert seen_share(row) <= 1.01
    assert list(row["checks"]) == list(CHECKS)
    faults = {check: given["fault"] for check, given in row["checks"].items() if "fault" in given}
    assert not faults
    worked = {check for check, given in WRITTEN.get(name, row)["checks"].items() if "is" in given}
    assert worked <= {check for check, given in row["checks"].items() if "is" in given}, "worked when the page was made"
    for method, shares in WRITTEN.get(name, row)["reach"].items():
        assert row["reach"][method]["macs"] >= shares["macs"] - 0.01, f"{method} reached more when the page was made"
