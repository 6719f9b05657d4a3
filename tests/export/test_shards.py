"""Conversion from shards to shards equals the conversion of the whole model, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from swaps import conv, planned
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import hodec
from hodec.errors import CheckpointError, PlanError
from hodec.export.checkpoint import weights_digest
from hodec.io.shards import Shards, grouped, shard_name, write_index

IMAGE, TOKENS = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16).reshape(2, 8)


class Tied(nn.Module):
    """An embedding and an output layer with one weight, attention, a recurrent layer and a padding row."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(40, 24), nn.Embedding(40, 24, padding_idx=1)
        self.attend, self.lstm = nn.MultiheadAttention(24, 2, batch_first=True), nn.LSTM(24, 24, batch_first=True)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 40)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.other(tokens)
        x = self.norm(self.lstm(self.attend(x, x, x)[0])[0])
        return self.head(x)


def convolutions() -> nn.Module:
    """Plain, grouped, transposed and computed ones, and BatchNorm with its whole number."""
    layers = (conv(), nn.BatchNorm2d(16), nn.ReLU(), conv(groups=2), nn.ConvTranspose2d(16, 16, 3), weight_norm(conv()))
    return nn.Sequential(*layers, nn.Conv2d(16, 16, (1, 3), bias=False))


NETS = {"convolutions": (convolutions, IMAGE), "tied": (Tied, TOKENS)}


def written(net: nn.Module, folder: Path, count: int = 3) -> Path:
    """The net's tensors in shards; of those that are one, the first only, as transformers writes them."""
    folder.mkdir()
    seen: set[int] = set()
    tensors = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = tensor.detach().contiguous()
        seen.add(id(tensor))
    names = list(tensors)
    files = {shard_name(k + 1, count): names[k::count] for k in range(count)}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    write_index(folder, files, sum(t.nbytes for t in tensors.values()))
    return folder


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


def seeded(build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


@pytest.mark.parametrize(
    "method", ["svd", "tucker", *(pytest.param(one, marks=pytest.mark.slow) for one in ("tt", "cp"))]
)
@pytest.mark.parametrize("kind", NETS)
def test_shards_become_what_the_whole_model_becomes(kind: str, method: str, tmp_path):
    build, x = NETS[kind]
    net = seeded(build)
    plan = planned(net, 3, x, method=method, allow_larger=True)
    source = written(net, tmp_path / "dense")
    hodec.convert_shards(on_meta(build), plan, source, tmp_path / "small", shard_bytes=1000)
    whole = hodec.convert(net, plan)
    assert len(Shards(tmp_path / "small").files) > 2
    for skeleton in (on_meta(build), seeded(build)):
        small = hodec.load(tmp_path / "small", skeleton)
        assert weights_digest(small) == weights_digest(whole)
        assert_close(small.eval()(x), whole.eval()(x), rtol=0, atol=0)
    if kind == "tied" and method == "svd":
        assert small.table.kernels[0] is small.head.kernels[0]


def test_a_file_fills_a_skeleton_without_memory(tmp_path):
    net = seeded(Tied)
    small = hodec.convert(net, planned(net, 3, TOKENS, method="svd"))
    hodec.save(small, tmp_path / "small.safetensors")
    again = hodec.load(tmp_path / "small.safetensors", on_meta(Tied))
    assert weights_digest(again) == weights_digest(small)
    assert again.table.kernels[0] is again.head.kernels[0]


def test_each_weight_is_read_once(tmp_path, monkeypatch):
    net, read = seeded(convolutions), []
    plan, source = planned(net, 3, IMAGE, method="svd"), written(net, tmp_path / "dense")
    real = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name: read.append(name) or real(self, name))
    hodec.convert_shards(on_meta(convolutions), plan, source, tmp_path / "small")
    assert sorted(read) == sorted(net.state_dict())


@pytest.mark.parametrize("rule", [3, "ratio", "energy", "vbmf", "budget"])
def test_a_plan_of_shards_is_that_of_the_whole_model(rule, tmp_path):
    net = seeded(convolutions)
    source, given = written(net, tmp_path / "dense"), {"method": "svd", "example_input": IMAGE}
    plan = hodec.make_plan(on_meta(convolutions), rule, weights=source, **given)
    assert plan.to_dict() == hodec.make_plan(net, rule, **given).to_dict()


def test_rules_that_need_no_weights_need_no_file():
    for rule in (3, "ratio"):
        plan = hodec.make_plan(on_meta(Tied), rule, method="svd", example_input=TOKENS)
        assert plan.to_dict() == hodec.make_plan(Tied(), rule, method="svd", example_input=TOKENS).to_dict()


@pytest.mark.parametrize(
    ("rule", "way"), [("energy", "weights='FOLDER'"), ("greedy", "a model that holds its weights")]
)
def test_rules_that_need_weights_say_the_way_out(rule: str, way: str):
    with pytest.raises(PlanError, match=rf"on the meta device.*rule {rule} needs them.*Give {way}.*rule=manual"):
        hodec.make_plan(on_meta(convolutions), rule, method="svd", example_input=IMAGE)


def test_weights_are_for_models_without_their_own(tmp_path):
    net = seeded(convolutions)
    with pytest.raises(PlanError, match=r"holds numbers of its own"):
        hodec.make_plan(net, 3, example_input=IMAGE, weights=written(net, tmp_path / "dense"))


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(tmp_path) -> Path:
    return written(seeded(convolutions), tmp_path / "dense")


def edited(folder: Path, change) -> Path:
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value)
    index.write_text(json.dumps(value))
    return folder


def outside(value) -> None:
    value["weight_map"]["0.weight"] = "../elsewhere.safetensors"


def elsewhere(value) -> None:
    value["weight_map"]["more.weight"] = shard_name(1, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outside, "is no .safetensors file beside it"),
        (elsewhere, "index names more.weight"),
        (lambda value: value.pop("weight_map"), "lacks a weight_map"),
    ],
)
def test_an_index_that_is_wrong_is_refused(dense: Path, change, words: str):
    with pytest.raises(CheckpointError, match=words):
        Shards(edited(dense, change))


def test_folders_that_hold_no_shards_are_refused(tmp_path, dense: Path):
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        Shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist"):
        Shards(tmp_path / "nowhere")
    (dense / shard_name(2, 3)).write_bytes(b"12")
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is not a readable"):
        Shards(dense)


def test_shards_of_another_model_are_refused_before_a_file_is_written(tmp_path, dense: Path):
    def other() -> nn.Module:
        return nn.Sequential(conv(), conv())

    plan = planned(seeded(other), 3, IMAGE, method="svd")
    with pytest.raises(CheckpointError, match=r"has no tensor 1\.weight|1\.weight is"):
        hodec.convert_shards(on_meta(other), plan, dense, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_an_output_folder_with_files_is_refused(tmp_path, dense: Path):
    plan = planned(seeded(convolutions), 3, IMAGE, method="svd")
    with pytest.raises(CheckpointError, match=r"holds files; name a new or an empty folder"):
        hodec.convert_shards(on_meta(convolutions), plan, dense, dense)


def test_altered_shards_and_absent_buffers_are_refused(tmp_path, dense: Path):
    plan, small = planned(seeded(convolutions), 3, IMAGE, method="svd"), tmp_path / "small"
    hodec.convert_shards(on_meta(convolutions), plan, dense, small)
    with pytest.raises(CheckpointError, match="give it as skeleton"):
        hodec.load(small)
    skeleton = on_meta(convolutions)
    skeleton.register_buffer("scale", torch.ones(1, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"1 buffers of the skeleton are on the meta device .* first scale"):
        hodec.load(small, skeleton)
    (file,) = Shards(small).files
    tensors = load_file(file)
    tensors["1.bias"] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="SHA-256"):
        hodec.load(small, on_meta(convolutions))


def test_groups_keep_the_order_and_the_limit():
    assert grouped({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]
