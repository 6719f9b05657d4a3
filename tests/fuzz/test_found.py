"""Inputs that the fuzz has found to end otherwise than rightly or in one message, each as small as it can be."""

import json
import struct
import time

import fuzz_files
import fuzz_plans
import onnx
import pytest
import torch
from fuzz_configs import default_text
from safetensors.torch import save

from hodec.errors import CheckpointError, ConfigError, PlanError, Use
from hodec.experiment.config.groups import CONF
from hodec.experiment.config.overrides import check_overrides
from hodec.experiment.config.schema import read_config
from hodec.formats.modes import Modes
from hodec.io.atomic import remove_parts
from hodec.models.weights import load_weights
from hodec.onnx_graph.decompose import decompose_file
from hodec.plan.plan import Plan
from hodec.ranks import Manual

from small_graphs import conv_net  # isort: skip


def plan_with(kind, change):
    """The plan of a net of ``fuzz_plans`` with a change, read again."""
    tree = json.loads(fuzz_plans.text_of(*kind))
    change(tree)
    return Plan.from_dict(tree)


RESNET, SPATIAL = ("resnet", "tucker", 1), ("resnet", "spatial_svd", 1)


# -- plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [(0.0, ""), (True, 6), ("6",), (None,), ([6],)])
def test_modes_that_are_no_whole_numbers_are_refused(odd):
    with pytest.raises(PlanError, match="modes in=.* do not fit 6 -> 6 channels"):
        Modes(odd, (6,)).check(6, 6)


def test_modes_of_channels_without_end_are_refused_at_once():
    """An even split was to be suggested, for which all divisors of 10^18 + 9 would have been tried."""
    began = time.perf_counter()
    for count in (2, 5000):  # and so deep that Python gives up
        with pytest.raises(PlanError, match="do not fit"):
            Modes((3,) * count, (1,) * count).check(10**18 + 9, 1)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("shape", [[24, 12, 3], [24, 12, 3, 3, 3], [24, 12]])
def test_a_shape_of_other_axes_than_its_layer_has_is_refused(shape):
    with pytest.raises(PlanError, match=r"layer1.conv1: shape .* is not that of a conv2d weight, which has 4 axes"):
        plan_with(SPATIAL, lambda tree: tree["layers"]["layer1.conv1"].update(shape=shape))


@pytest.mark.parametrize("number", [2**53 + 1, 10**400])
def test_numbers_that_no_net_has_are_refused(number):
    """As costs they could not be shown: they are no floats."""
    with pytest.raises(PlanError, match=r"at most 2\^53"):
        plan_with(RESNET, lambda tree: tree["totals"].update(params_before=number))
    with pytest.raises(PlanError, match=r"at most 2\^53"):
        plan_with(RESNET, lambda tree: tree["layers"]["conv1"].update(computed_from=number))


def test_inputs_whose_count_cannot_be_written_are_refused():
    """2^26500 has more digits than Python writes."""
    with pytest.raises(PlanError, match=r"hold more than 2\^53 numbers"):
        plan_with(RESNET, lambda tree: tree["inputs"][0].update(shape=[2**53] * 500))


@pytest.mark.parametrize("dtype", ["quint8", "qint32", "bits8", "Tensor", "nope"])
def test_inputs_of_types_that_no_numbers_are_made_in_are_refused(dtype):
    with pytest.raises(PlanError, match="type of the plan's inputs"):
        plan_with(RESNET, lambda tree: tree["inputs"][0].update(dtype=dtype))


# -- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tree: tree["ranks"].update(name={"a": 1}), "ranks.name"),
        (lambda tree: tree["data"].update(name=["digits"]), "data.name"),
        (lambda tree: tree.update(objective=[["macs"]]), "objective"),
        (lambda tree: tree.update(objective=[{"macs": 1}]), "objective"),
        (lambda tree: tree["optimizer"].update(lr=10**400), "optimizer.lr"),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(change, named):
    tree = json.loads(default_text())
    change(tree)
    config, errors = read_config(tree)
    assert config is None
    assert named in errors[0].told(Use.in_hydra)


@pytest.mark.parametrize("argv", [["--config-dir"], ["-cd"], ["--cfg"], ["--package"]])
def test_an_option_without_its_value_is_one_message(argv):
    with pytest.raises(ConfigError, match="expected one argument; see --help"):
        check_overrides(argv, CONF)


# -- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.quantize_per_tensor(torch.zeros(()), 0.1, 0, torch.qint8),
        lambda: torch.zeros((), dtype=torch.complex64),
        lambda: torch.zeros((), device="meta"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch, about quantized tensors
def test_counters_of_another_kind_are_refused(tmp_path, odd):
    torch.save({**fuzz_files.net().state_dict(), "bn1.num_batches_tracked": odd()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="num_batches_tracked"):
        fuzz_files.load(tmp_path / "w.pt")


def test_counters_of_other_whole_and_floating_types_are_taken(tmp_path):
    net = fuzz_files.net()
    for count in (torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)):
        torch.save({**net.state_dict(), "bn1.num_batches_tracked": count}, tmp_path / "w.pt")
        model = fuzz_files.SmallResNet()
        load_weights(model, tmp_path / "w.pt")
        assert model.bn1.num_batches_tracked == 7


def test_thousands_of_axes_are_not_all_shown(tmp_path):
    content = save({"fc.bias": torch.zeros(1)})
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["fc.bias"]["shape"] = [1] * 5000
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(CheckpointError) as error:
        fuzz_files.load(tmp_path / "w.safetensors")
    assert len(str(error.value)) < 1000


# -- model files ------------------------------------------------------------------------------------------------


def with_input(path, *size):
    """A file that says that its input has this size."""
    model = onnx.load(str(conv_net(path)))
    for dim, n in zip(model.graph.input[0].type.tensor_type.shape.dim, size, strict=True):
        dim.dim_value = n
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("size", [(1, 8, 2**40, 12), (2**31, 8, 10, 12), (1, 8, 2**20, 2**20)])
def test_a_file_that_says_it_takes_terabytes_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match="its inputs .* hold more than 268,435,456 numbers"):
        decompose_file(with_input(tmp_path / "in.onnx", *size), tmp_path / "out.onnx", rule=Manual(4))
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_that_says_it_takes_no_images_is_decomposed(tmp_path):
    """Costs of one image were a division by 0."""
    outcome = decompose_file(with_input(tmp_path / "in.onnx", 0, 8, 10, 12), tmp_path / "out.onnx", rule=Manual(4))
    assert outcome.after.params < outcome.before.params
    assert outcome.after.macs == 0


# -- run folders ------------------------------------------------------------------------------------------------


def test_parts_of_files_are_removed_and_nothing_else(tmp_path):
    for name in (".run.json.abc.part", "phases/.admm.safetensors.x1.part", "notes.part"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half of")
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["notes.part"]
