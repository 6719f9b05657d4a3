"""A compressed model on disk: what is read is what was written, or it is refused."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hodec.conversion.swap import convert
from hodec.errors import CheckpointError, PlanError
from hodec.export import checkpoint
from hodec.export.checkpoint import load, read_structure, save, weights_digest
from hodec.fusion.search import fuse
from hodec.io.atomic import sha256
from hodec.io.tensors import load_tensors, save_tensors
from hodec.methods import METHODS
from hodec.models import build_model
from hodec.plan.plan import Plan
from hodec.ranks import Manual, make_plan


def dense_net(width=12):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 16),
    )


X = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(7))


def trained_small(net, method="tt", **options):
    """A converted net, one training step later: its BatchNorm and factors are no longer what conversion made."""
    plan = make_plan(net, Manual(3), method=method, example_input=X, allow_larger=True, **options)
    small = convert(net, plan)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(X).square().mean().backward()
    optimizer.step()
    return small.eval(), plan


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"n_modes": 3}, {"execution": "chain"}])
def test_a_reloaded_model_gives_the_same_outputs_exactly(tmp_path, method, options):
    if "execution" in options and options["execution"] not in METHODS[method].format("conv2d").executions:
        pytest.skip(f"{method} has no execution {options['execution']}")
    small, plan = trained_small(dense_net(), method, **options)
    save(small, tmp_path / "small.safetensors", plan)
    torch.manual_seed(99)
    skeleton = dense_net()
    again = load(tmp_path / "small.safetensors", skeleton).eval()
    with torch.no_grad():
        assert_close(again(X), small(X), rtol=0, atol=0)
    assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert weights_digest(again) == weights_digest(small)
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]


@pytest.fixture
def written(tmp_path):
    """Path of a saved model."""
    net = dense_net()
    small, plan = trained_small(net)
    path = tmp_path / "small.safetensors"
    save(small, path, plan, facts={"model": "mine"})
    return path


def test_the_skeleton_is_left_as_it_was(written):
    skeleton = dense_net()
    before = {name: t.clone() for name, t in skeleton.state_dict().items()}
    load(written, skeleton)
    assert_close(skeleton.state_dict(), before, rtol=0, atol=0)
    assert type(skeleton[0]) is nn.Conv2d


def test_facts_are_kept(written):
    assert read_structure(written)["facts"] == {"model": "mine"}


def test_the_same_model_is_written_as_the_same_bytes(tmp_path, written):
    small, plan = trained_small(dense_net())
    for number in range(5):
        path = tmp_path / f"again{number}.safetensors"
        save(load(written, dense_net()), path, plan)
        assert path.read_bytes() == written.read_bytes()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))


def drop_key(path, key):
    structure = path.with_suffix(".json")
    structure.write_text(json.dumps({k: v for k, v in json.loads(structure.read_text()).items() if k != key}))


HARMS = {
    "one bit": (flip, "truncated or was altered: its SHA-256"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-10]), "truncated or was altered"),
    "missing": (lambda p: p.unlink(), r"small\.safetensors does not exist"),
    "no json": (lambda p: p.with_suffix(".json").unlink(), r"structure of the model .*small\.json does not exist"),
    "broken json": (lambda p: p.with_suffix(".json").write_text('{"format"'), "not readable JSON"),
    "other json": (lambda p: p.with_suffix(".json").write_text("[1]"), "not a hodec model of version 1"),
    "no digest": (lambda p: drop_key(p, "sha256"), r"small\.json lacks sha256"),
    "no plan": (lambda p: drop_key(p, "plan"), r"small\.json lacks plan"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_harmed_files_are_refused_with_one_message(written, harm):
    act, words = HARMS[harm]
    act(written)
    with pytest.raises(CheckpointError, match=words) as error:
        load(written, dense_net())
    assert "\n" not in str(error.value)


def test_another_skeleton_is_refused(written):
    with pytest.raises(PlanError, match=r"0: the plan is for a conv2d weight \(12, 3, 3, 3\), this model has .*16"):
        load(written, dense_net(16))
    with pytest.raises(PlanError, match="which this model lacks"):
        load(written, nn.Sequential(nn.Conv2d(3, 12, 3, padding=1)))


def test_a_skeleton_that_differs_outside_the_plan_is_refused(written):
    skeleton = dense_net()
    skeleton[1] = nn.BatchNorm2d(12, affine=False)
    with pytest.raises(CheckpointError, match=r"does not fit this skeleton: 2 of .* tensors differ, first 1\.bias"):
        load(written, skeleton)


def test_tensors_swapped_with_a_matching_digest_are_still_checked(written):
    """An edited file whose digest was edited too."""
    structure = json.loads(written.with_suffix(".json").read_text())
    save_tensors(written, {"other": torch.zeros(3)})
    from hodec.io.atomic import sha256

    structure["sha256"] = sha256(written)
    written.with_suffix(".json").write_text(json.dumps(structure))
    with pytest.raises(CheckpointError, match="does not fit this skeleton"):
        load(written, dense_net())


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    small, _ = trained_small(dense_net())
    with torch.no_grad():
        next(small.parameters()).view(-1)[0] = torch.nan
    save(small, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=r"holds NaN in 1 tensors, first 0\."):
        load(tmp_path / "broken.safetensors", dense_net())


def test_an_edited_plan_is_checked(written):
    structure = json.loads(written.with_suffix(".json").read_text())
    structure["plan"]["layers"]["3"]["ranks"] = [500, 1, 1, 1]
    written.with_suffix(".json").write_text(json.dumps(structure))
    with pytest.raises(PlanError, match="3 .*do not fit"):
        load(written, dense_net())


@pytest.mark.parametrize("name", ["model.pt", "model.json", "model"])
def test_another_ending_is_refused(tmp_path, name):
    """With .json the structure would overwrite the weights."""
    small, plan = trained_small(dense_net())
    with pytest.raises(CheckpointError, match=r"written to a \.safetensors file"):
        save(small, tmp_path / name, plan)
    assert not list(tmp_path.iterdir())


def test_digest_tells_every_bit_and_every_name():
    net = dense_net()
    first = weights_digest(net)
    assert weights_digest(net) == first
    net[6].bias.data[3] = torch.nextafter(net[6].bias.data[3], torch.tensor(9.0))
    assert weights_digest(net) != first
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert weights_digest(nn.ModuleDict({"a": a})) != weights_digest(nn.ModuleDict({"b": b}))


def test_digest_of_half_precision_weights():
    assert weights_digest(dense_net().bfloat16()) != weights_digest(dense_net().half())


def test_a_model_says_its_plan_by_itself(tmp_path):
    small, plan = trained_small(dense_net())
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", dense_net())
    save(again, tmp_path / "again.safetensors")  # and what was read can be written again
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
    assert read_structure(tmp_path / "again.safetensors")["plan"] == plan.to_dict()


def test_a_net_known_by_name_needs_no_skeleton(tmp_path):
    facts = {"model": "resnet20", "in_channels": 3, "num_classes": 4, "image_size": [8, 8]}
    net, x = build_model("resnet20", in_channels=3, num_classes=4), torch.randn(2, 3, 8, 8)
    small = convert(net, make_plan(net, Manual(3), example_input=x)).eval()
    path = tmp_path / "small.safetensors"
    save(small, path, facts=facts)
    state = torch.get_rng_state()
    again = load(path).eval()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert_close(again(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "lack model, in_channels, num_classes, image_size.*give the net as skeleton"),
        (["resnet20"], "give the net as skeleton"),
        ({"model": "resnet21", "in_channels": 3, "num_classes": 4, "image_size": [8, 8]}, "'resnet21' is unknown"),
        ({"model": 20, "in_channels": 3, "num_classes": 4, "image_size": [8, 8]}, "no net can be built"),
        ({"model": "resnet20", "in_channels": "3", "num_classes": 4, "image_size": [8, 8]}, "no net can be built"),
        ({"model": "resnet20", "in_channels": 3, "num_classes": 4, "image_size": 8}, "no net can be built"),
    ],
)
def test_without_a_skeleton_the_file_must_name_its_net(written, facts, words):
    structure = json.loads(written.with_suffix(".json").read_text())
    written.with_suffix(".json").write_text(json.dumps({**structure, "facts": facts}))
    with pytest.raises(CheckpointError, match=words) as error:
        load(written)
    assert "\n" not in str(error.value)


def named(tmp_path, **changed):
    """A compressed ResNet that needs no skeleton, some facts of which were altered."""
    net, x = build_model("resnet20", in_channels=3, num_classes=4), torch.randn(2, 3, 8, 8)
    path, facts = tmp_path / "named.safetensors", {"model": "resnet20", "in_channels": 3, "num_classes": 4}
    save(convert(net, make_plan(net, Manual(3), example_input=x)), path, facts={**facts, "image_size": [8, 8]})
    structure = json.loads(path.with_suffix(".json").read_text())
    structure["facts"] |= changed
    path.with_suffix(".json").write_text(json.dumps(structure))
    return path, structure


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_classes": 10**9}, r"does not fit this skeleton: .*linear\.\w+ .*model \(1000000000,"),
        ({"in_channels": 10**12}, r"named\.safetensors"),
        ({"model": "torchvision/vgg11", "image_size": [32, 32]}, "does not fit this skeleton"),
        ({"image_size": [10**5]}, "image_size a list of two"),
        ({"num_classes": True}, "num_classes are whole numbers"),
    ],
)
def test_facts_that_ask_for_more_than_the_file_holds_take_no_memory(tmp_path, monkeypatch, changed, words):
    path, _ = named(tmp_path, **changed)
    real = checkpoint.build_model

    def build(*args, **kwargs):
        assert torch.get_default_device().type == "meta", "memory is taken"
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "build_model", build)
    with pytest.raises(CheckpointError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [torch.complex64, torch.int8])
def test_tensors_of_another_kind_of_number_are_refused(written, kind):
    tensors = {name: t.to(kind) if t.is_floating_point() else t for name, t in load_tensors(written).items()}
    try:
        save_tensors(written, tensors)
    except KeyError:
        pytest.skip("safetensors before 0.5 writes no complex numbers")
    structure = json.loads(written.with_suffix(".json").read_text()) | {"sha256": sha256(written)}
    written.with_suffix(".json").write_text(json.dumps(structure))
    with pytest.raises(CheckpointError, match="hold numbers of another kind than the model's, first"):
        load(written, dense_net())


def test_a_planned_layer_out_of_proportion_to_the_file_takes_no_memory(tmp_path, monkeypatch):
    """Facts and plan fit each other, a rank of 1 holds next to nothing, and the dense net would be enormous."""
    monkeypatch.setattr(checkpoint, "MOST_RATIO", 2)
    path, _ = named(tmp_path)
    with pytest.raises(CheckpointError, match="more than 2 times as many: its facts were altered"):
        load(path)


def test_a_model_without_its_plan_is_not_written(tmp_path):
    small, _ = trained_small(dense_net())
    with pytest.raises(CheckpointError, match=r"holds no plan.*hodec\.save\(model, path, plan\)"):
        save(nn.Sequential(small), tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    small, plan = trained_small(dense_net())
    other = make_plan(dense_net(), Manual(2), method="tt", example_input=X, allow_larger=True)
    fused = fuse(small, example_input=X, target="macs")
    for model, given in ((dense_net(), plan), (small, other), (fused, plan), (fused, None), (nn.Sequential(), plan)):
        with pytest.raises(CheckpointError, match=r"save: \d is \w+ in this model, and tt at ranks"):
            save(model, tmp_path / "small.safetensors", given)
    with pytest.raises(CheckpointError, match=r"save: \d is factorized in this model, and not in the plan"):
        save(small, tmp_path / "small.safetensors", plan.without(next(iter(plan))))

    class Counts(nn.Sequential):
        def get_extra_state(self) -> object:
            return {"calls": 0}

    with pytest.raises(CheckpointError, match="save: _extra_state of the state_dict is a dict, no tensor"):
        save(Counts(*small), tmp_path / "small.safetensors", plan)
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_is_written_under_its_own_names(tmp_path):
    small, plan = trained_small(dense_net())
    save(torch.compile(small), tmp_path / "small.safetensors", plan)
    assert weights_digest(load(tmp_path / "small.safetensors", dense_net())) == weights_digest(small)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    small, _ = trained_small(dense_net())
    (tmp_path / "small.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"small\.safetensors could not be written: Is a directory"):
        save(small, tmp_path / "small.safetensors")


@pytest.mark.parametrize("name", ["small.json", "small.onnx", "small"])
def test_only_the_safetensors_file_is_read(written, name):
    with pytest.raises(CheckpointError, match=r"read from its \.safetensors file"):
        load(written.with_name(name), dense_net())


def test_structure_first_then_the_optimizer_then_the_state_of_both(written):
    """Resuming the training of a compressed model: what an optimizer holds must be the layers that go on."""

    def step(model, optimizer):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    model = load(written, dense_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    kept = (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    again = convert(dense_net(), Plan.from_dict(read_structure(written)["plan"]), decompose=False)
    resumed = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    step(again, resumed)
    assert weights_digest(again) == weights_digest(model)


def test_two_tensors_are_not_read_into_one(tmp_path):
    """The skeleton ties what the saved net had untied: the last in the file would win."""

    def tied():
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        net[1].weight = net[0].weight
        return net

    x, net = torch.randn(2, 8), tied()
    small = convert(net, make_plan(net, Manual({"2": 2}), method="svd", example_input=x))
    small[1].weight = nn.Parameter(small[1].weight.detach().clone())
    save(small, tmp_path / "small.safetensors")
    assert torch.equal(load(tmp_path / "small.safetensors", tied()).eval()(x), small.eval()(x))
    with torch.no_grad():
        small[1].weight += 1
    save(small, tmp_path / "small.safetensors")
    with torch.device("meta"):
        blank = tied()
    for skeleton in (tied(), blank):
        with pytest.raises(CheckpointError, match=r"one tensor for 0.weight and 1.weight.*untie them in the skeleton"):
            load(tmp_path / "small.safetensors", skeleton)
    untied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert torch.equal(load(tmp_path / "small.safetensors", untied).eval()(x), small.eval()(x))
