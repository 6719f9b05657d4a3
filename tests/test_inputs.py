"""Inputs of models: tensors, tuples, lists, dicts, keyword arguments, batches of loaders; wrong ones are named."""

import json
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hodec import collect_covariances, convert, fuse, make_plan, reestimate_batchnorm, to_program
from hodec.cost.count import count_cost, trace_call_sites
from hodec.cost.latency import LatencyTable
from hodec.errors import PlanError
from hodec.inference import run_batches, running_input
from hodec.inputs import ModelInput, as_input, form_of, from_form
from hodec.plan.plan import Plan
from hodec.ranks import Manual

X, Y, MASK = torch.randn(4, 16), torch.arange(4), torch.ones(4, 1)


class Masked(nn.Module):
    """Takes one input, and a mask that it can do without; returns what Hugging Face's models do: a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Any:
        y = self.last(self.norm(self.first(x)).relu())
        return UserDict(out=y * scale if mask is None else y * mask * scale)


class Nested(Masked):
    """Takes a list of pairs in a dict."""

    def forward(self, batch: dict[str, Any], times: int = 1) -> Any:
        first, (second, nothing) = batch["pair"]
        assert nothing is None
        assert times == 1
        return super().forward(first + second)


ENCODING = UserDict(x=X, mask=MASK)
GIVEN = {  # what is given, and what forward gets
    "tensor": (X, (X,), {}),
    "tuple": ((X, MASK), (X, MASK), {}),
    "list": ([X, MASK], (X, MASK), {}),
    "none": ((X, None), (X, None), {}),
    "keywords": ({"x": X, "mask": MASK, "scale": 2.0}, (), {"x": X, "mask": MASK, "scale": 2.0}),
    "another order": ({"mask": MASK, "x": X}, (), {"x": X, "mask": MASK}),
    "encoding": (ENCODING, (), {"x": X, "mask": MASK}),
    "batch of a dict": ({"x": X, "label": Y}, (), {"x": X}),
    "images and labels": ([X, Y], (X,), {}),
    "dict and labels": ([{"x": X}, Y], (), {"x": X}),
    "given": (ModelInput((X,), {"scale": 2.0}), (X,), {"scale": 2.0}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_model_gets_what_its_forward_takes(name: str):
    given, args, kwargs = GIVEN[name]
    model, expected = Masked().eval(), ModelInput(args, kwargs)
    made = running_input(model, given)
    assert [id(x) for x in made.tensors] == [id(x) for x in expected.tensors]
    assert (len(made.args), list(made.kwargs)) == (len(expected.args), list(expected.kwargs))
    torch.testing.assert_close(made.run(model)["out"], expected.run(model)["out"], rtol=0, atol=0)


@pytest.mark.parametrize("name", GIVEN)
def test_the_whole_way_with_every_form(name: str):
    """Plan, file, conversion with its dry run, covariances, batch norms, fusion."""
    model, (given, *_) = Masked(), GIVEN[name]
    plan = make_plan(model, Manual(4), method="svd", example_input=given)
    assert plan == Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert list(plan) == ["first", "last"]
    again = plan.example_input()
    assert [tuple(x.shape) for x in again.tensors] == [(2, *size[1:]) for size, _ in plan.inputs]
    small = convert(model, plan)
    assert list(collect_covariances(model, plan, [given])) == list(plan)
    assert reestimate_batchnorm(small, [given]) == 1
    assert "norm" in fuse(small, example_input=given, target="macs").fuse_report.folded
    assert count_cost(small, given).macs == plan.macs_after


def test_labels_behind_a_list_of_images_are_no_input():
    class Detector(Masked):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            assert targets is None
            return super().forward(torch.stack([image.mean((0, 2)) for image in images]))

    images = [torch.rand(3, 16, 9), torch.rand(3, 16, 7)]
    model = Detector()
    plan = make_plan(model, Manual(4), method="svd", example_input=(images,))
    assert (len(plan.inputs), plan["first"].macs_before) == (2, 16 * 24)
    assert list(collect_covariances(model, plan, [(images, [{"boxes": X}])])) == list(plan)
    assert [tuple(x.shape) for x in plan.example_input().tensors] == [(3, 16, 9), (3, 16, 7)]


def test_lists_in_dicts_with_none_and_numbers():
    model, given = Nested(), ({"pair": [X, (X, None)]}, 1)
    plan = make_plan(model, Manual(4), method="svd", example_input=given)
    assert plan.inputs == (((4, 16), "float32"),) * 2
    first, times = Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).example_input().args
    assert times == 1
    assert isinstance(first["pair"][1], tuple)
    assert first["pair"][1][1] is None
    assert first["pair"][0].shape == (2, 16)
    convert(model, plan)
    alone = make_plan(model, Manual(4), method="svd", example_input={"pair": [X, (X, None)]})
    assert alone.layers == plan.layers


def test_the_dry_run_has_the_form_of_the_plans_input():
    class Strict(Masked):
        def forward(self, *, x: Tensor, size: int) -> Any:
            assert x.shape[1] == size
            return super().forward(x)

    plan = make_plan(Strict(), Manual(4), method="svd", example_input={"x": X, "size": 16})
    assert plan.input_form == {"args": [], "kwargs": {"x": {"tensor": 0}, "size": 16}}
    broken = Plan.from_dict({**plan.to_dict(), "input_form": None})
    assert [len(one.example_input().kwargs) for one in (plan, broken)] == [2, 0]
    convert(Strict(), plan)


def test_inputs_of_plain_tensors_have_no_form_and_older_files_none():
    plan = make_plan(Masked(), Manual(4), method="svd", example_input=(X, MASK))
    assert plan.input_form is None
    older = {key: value for key, value in plan.to_dict().items() if key != "input_form"}
    assert Plan.from_dict({**older, "version": 2}) == plan


def test_the_dry_run_cuts_no_tensor_without_the_batch(caplog: pytest.LogCaptureFixture):
    class Attends(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.last(self.first(mask @ x))

    given = (torch.randn(1, 5, 16), torch.zeros(5, 5))
    plan = make_plan(Attends(), Manual(4), method="svd", example_input=given)
    assert [x.shape for x in plan.example_input().args] == [(2, 5, 16), (5, 5)]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    convert(Attends(), plan)
    assert "not even the dense model runs" not in caplog.text


@pytest.mark.parametrize("form", [{"args": [{"tensor": 3}], "kwargs": {}}, {"args": []}, [], {"args": 3, "kwargs": {}}])
def test_forms_that_do_not_fit_are_refused(form: object):
    plan = make_plan(Masked(), Manual(4), method="svd", example_input={"x": X}).to_dict()
    with pytest.raises(PlanError, match="form of the plan's inputs"):
        Plan.from_dict({**plan, "input_form": form})


def test_a_form_and_back():
    given = ModelInput(([X, {"a": (Y, None, 2.5, "word")}],), {"b": True, "c": X})
    back = from_form(json.loads(json.dumps(form_of(given))), given.tensors)
    assert [id(x) for x in back.tensors] == [id(x) for x in (X, Y, X)]
    assert back.args[0][1]["a"][1:] == (None, 2.5, "word")
    assert back.kwargs["b"] is True
    assert form_of(ModelInput((X, object()))) is None


def test_loaders_batches():
    model, loader = Masked(), DataLoader(TensorDataset(X, Y), batch_size=2)
    plan = make_plan(model, Manual(4), method="svd", example_input=next(iter(loader)))
    assert plan.inputs == (((2, 16), "float32"),)
    assert reestimate_batchnorm(model, loader) == 2
    assert run_batches(model.eval(), loader) == 2


def test_a_batch_is_the_first_axis_or_a_list_of_images():
    images = [torch.rand(3, 8, 9), torch.rand(3, 6, 7)]
    assert (as_input(X).batch, as_input({"n": 3, "x": X}).batch, as_input((images,)).batch) == (4, 4, 2)
    assert as_input((X, torch.ones(1))).with_batch(6).sizes == (((6, 16), "float32"), ((1,), "float32"))
    assert as_input((images,)).with_batch(6).sizes == as_input((images,)).sizes


WRONG = {
    "unknown": ({"input": X}, r"float32 4x16.*takes \(x, \[mask\], \[scale\]\)"),
    "missing": (
        {"mask": MASK},
        r"mask=float32 4x1\) does not fit: missing a required argument: 'x'; the forward of Mas",
    ),
    "size": (torch.ones(2, 5), r"does not run on example_input \(float32 2x5\): RuntimeError: .*takes \(x, \[mask\]"),
    "no tensor": ({"x": 3}, r"with the batch as its first axis; \{x: 3\} given; the forward of Masked takes"),
    "empty": (torch.ones(0, 16), "batch as its first axis; float32 0x16 given"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_named_with_what_forward_takes(name: str):
    given, message = WRONG[name]
    with pytest.raises(PlanError, match=message):
        make_plan(Masked(), Manual(4), method="svd", example_input=given)


def test_call_sites_and_latency_by_keywords():
    given = {"x": X, "mask": MASK}
    assert set(trace_call_sites(Masked(), given)) == {"first", "last"}
    assert LatencyTable(batch=3).net_ms(Masked(), given) > 0


def test_a_program_of_a_model_that_takes_keywords(tmp_path):
    class Plain(Masked):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            return super().forward(x, mask)["out"]

    given = {"x": X, "mask": MASK}
    small = convert(Plain(), make_plan(Plain(), Manual(4), method="svd", example_input=given))
    written = to_program(small, tmp_path / "small.pt2", example_input=given)
    assert written.error < 1e-4
    assert written.batches == (4, 1, 6)


def test_a_form_whose_keys_were_sorted_is_put_in_order():
    """As transformers does with those of a config, which holds the plan."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(4, 8)

        def forward(self, x: Tensor, inner: dict[str, Tensor]) -> Tensor:
            return self.a(x) + self.b(inner["a"]) + inner["b"]

    x = {"x": torch.randn(2, 8), "inner": {"b": torch.randn(2, 8), "a": torch.randn(2, 4)}}
    plan = make_plan(Net(), 2, method="svd", example_input=x)
    back = Plan.from_dict(json.loads(json.dumps(plan.to_dict(), sort_keys=True)))
    assert [each.shape for each in back.example_input().tensors] == [(2, 8), (2, 8), (2, 4)]
    convert(Net(), back)
