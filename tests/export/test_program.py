"""PyTorch programs: they run without hodec, at any batch size."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import hodec
from hodec.errors import CheckpointError, ConvertError
from hodec.export.program import cause, to_program
from hodec.ranks import Manual, make_plan

X = torch.randn(1, 6, 12, 12, generator=torch.Generator().manual_seed(0))


def dense_net() -> nn.Module:
    """As few nodes as the tests need: torch.export takes its time for each."""
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    return nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), *pooled)


def compressed(net: nn.Module, **settings: object) -> nn.Module:
    return hodec.convert(net, make_plan(net, Manual(3), example_input=X, **settings)).eval()


@pytest.mark.slow
def test_a_program_runs_alone(tmp_path):
    small = compressed(dense_net())
    written = to_program(small, tmp_path / "net.pt2", example_input=X)
    assert written.error == 0
    assert written.batches == (1, 3)
    x = torch.randn(4, 6, 12, 12)
    torch.save((x, small(x).detach()), tmp_path / "pair.pt")
    code = (
        "import sys, torch\n"
        f"x, expected = torch.load({str(tmp_path / 'pair.pt')!r})\n"
        f"made = torch.export.load({str(written.path)!r}).module()(x)\n"
        "torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)\n"
        "assert not any(name.startswith('hodec') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["tt_classical", "cp", "svd"])
def test_every_method_with_a_free_batch(tmp_path, method):
    small = compressed(dense_net(), method=method, allow_larger=True)
    assert to_program(small, tmp_path / "net.pt2", example_input=X).batches == (1, 3)


class Fixed(nn.Module):
    """Takes one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 12, 3)

    def forward(self, x):
        return self.conv(x.reshape(1, 6, 12, 12))


class ReadsWeight(nn.Module):
    """A parent that looks at the weight of its layer, as embeddings of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 10)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype))


def test_a_net_that_reads_the_type_of_a_weight(tmp_path):
    net, x = ReadsWeight().eval(), X[:, 0]
    small = hodec.convert(net, make_plan(net, Manual(3), example_input=x, method="svd"))
    assert to_program(small, tmp_path / "net.pt2", example_input=x).error == 0


def test_a_reason_is_what_went_wrong_first_without_colours():
    outer = RuntimeError("\x1b[96mStep 3/3\x1b[0m failed. Next steps:\n- write an issue")
    outer.__cause__ = ValueError("Constraints violated\n  - batch is at most 63\nSuggested fixes: ..")
    assert cause(outer) == "ValueError: Constraints violated batch is at most 63"
    assert cause(RuntimeError("\x1b[96mone\x1b[0m\n- advice")) == "RuntimeError: one"
    assert cause(RuntimeError()) == "RuntimeError: "


def test_a_batch_that_is_not_free_says_how(tmp_path):
    small = compressed(Fixed())
    with pytest.raises(ConvertError, match="dynamic_batch=False"):
        to_program(small, tmp_path / "net.pt2", example_input=X)
    assert not (tmp_path / "net.pt2").exists()
    assert to_program(small, tmp_path / "net.pt2", example_input=X, dynamic_batch=False).batches == (1,)


def test_an_existing_file_stays_when_writing_fails(tmp_path, monkeypatch):
    (tmp_path / "net.pt2").write_text("old")
    monkeypatch.setattr("hodec.compare.distance", lambda *_: 1.0)
    with pytest.raises(ConvertError, match="verify=False writes it all the same"):
        to_program(compressed(dense_net()), tmp_path / "net.pt2", example_input=X)
    assert (tmp_path / "net.pt2").read_text() == "old"
    assert to_program(compressed(dense_net()), tmp_path / "net.pt2", example_input=X, verify=False).error is None
    assert len(list(tmp_path.iterdir())) == 1


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"ends in \.pt2"):
        to_program(dense_net(), tmp_path / "net.pt", example_input=X)


class Scaled(nn.Module):
    """Takes a further input without the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 10)

    def forward(self, x, scales):
        return self.layer(x) * scales.sum()


def test_an_input_that_is_as_long_as_a_batch_would_be_is_none(tmp_path):
    given = X[:, 0, 0], torch.tensor([3.0, 4.0])
    written = to_program(Scaled().eval(), tmp_path / "net.pt2", example_input=given)
    assert (written.error, written.batches) == (0, (1, 3))


def test_a_fused_net_comes_back_in_its_mode(tmp_path):
    fused = hodec.fuse(dense_net(), example_input=X, target="macs").train()
    fused[1].eval()
    modes = [module.training for module in fused.modules()]
    to_program(fused, tmp_path / "net.pt2", example_input=X, verify=False)
    assert [module.training for module in fused.modules()] == modes
