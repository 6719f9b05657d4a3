"""hodec plan at the shell: a plan on the screen and in a file, which train.py and convert take."""

import json
import socket

import pytest
import torch
from safetensors.torch import save_file

from hodec.cli import main as cli
from hodec.conversion.swap import convert
from hodec.cost.count import count_cost
from hodec.errors import HodecError
from hodec.experiment.pipeline import run
from hodec.models import build_model
from hodec.plan.plan import Plan
from hodec.ranks import Budget, Ratio, make_plan

from tiny_runs import tiny  # isort: skip

# Plans of tiny images cost the least time.
SMALL = ("--model", "resnet20", "--image-size", "8")
X = torch.zeros(1, 3, 8, 8)


def call(capsys, *argv):
    code = cli.main(["plan", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def resnet20(seed=0, **changes):
    torch.manual_seed(seed)
    return build_model("resnet20", **{"in_channels": 3, "num_classes": 10, **changes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_file(resnet20(seed=3).state_dict(), path)
    return path


def test_the_plan_is_that_of_make_plan_and_its_costs_are_those_of_the_net(capsys):
    code, out, err = call(capsys, *SMALL, "--rule", "ratio", "--target", "0.4", "--method", "tucker", "--json")
    assert (code, err) == (0, "")
    model = resnet20()
    plan = make_plan(model, Ratio(0.4), method="tucker", example_input=X)
    found = Plan.from_dict(json.loads(out))
    assert found == plan
    small = convert(model, found)
    assert count_cost(small, X).macs == found.macs_after
    code, out, _ = call(capsys, *SMALL, "--rule", "ratio", "--target", "0.4", "--method", "tucker")
    assert out == f"{plan}\n"


def test_row_targets_are_met_on_trained_weights_without_a_warning(capsys, weights):
    code, out, err = call(capsys, *SMALL, "--weights", weights, "--macs", "0.3", "--json")
    assert (code, err) == (0, "")
    plan = Plan.from_dict(json.loads(out))
    assert plan == make_plan(resnet20(seed=3), Budget(0.3), example_input=X)
    assert 0.3 * 0.995 <= 1 - plan.reduction["macs"] <= 0.3


def test_weights_in_a_folder_of_shards_make_the_same_plan(capsys, weights):
    argv = (*SMALL, "--rule", "energy", "--keep", "0.7", "--json")
    assert call(capsys, *argv, "--weights", weights.parent) == call(capsys, *argv, "--weights", weights)
    code, _, err = call(capsys, *SMALL, "--num-classes", "7", "--weights", weights.parent, "--rule", "energy")
    assert (code, err.count("\n")) == (2, 1)
    assert "--weights: " in err
    assert "linear.weight is (10, 64), and the model's layer linear (7, 64)" in err


def test_random_weights_are_warned_about_in_one_line_where_they_are_read(capsys, caplog):
    code, _, _ = call(capsys, *SMALL, "--rule", "vbmf")
    assert code == 0
    texts = [record.getMessage() for record in caplog.records if record.name == "hodec.cli.plan"]
    assert len(texts) == 1
    assert "rule vbmf reads the weights, and these are random" in texts[0]
    assert "--weights FILE" in texts[0]
    assert "\n" not in texts[0]
    caplog.clear()
    call(capsys, *SMALL, "--rule", "ratio")
    assert not [record for record in caplog.records if record.name == "hodec.cli.plan"]


@pytest.mark.parametrize(
    ("argv", "inputs", "dense"),
    [
        (("--model", "resnet20"), (1, 3, 32, 32), 40_551_040),
        (("--model", "torchvision/squeezenet1_1"), (1, 3, 224, 224), 349_151_936),
        (("--model", "squeezenet1_1", "--in-channels", "1", "--num-classes", "7", "--image-size", "64"),
         (1, 1, 64, 64), None),
    ],
)  # fmt: skip
def test_images_are_those_the_family_was_published_with(capsys, argv, inputs, dense):
    some = "layer1.*" if "resnet20" in argv else "*.expand3x3"
    code, out, _ = call(capsys, *argv, "--rule", "ratio", "--include", some, "--json")
    assert code == 0
    plan = Plan.from_dict(json.loads(out))
    assert plan.inputs == ((inputs, "float32"),)
    assert dense is None or plan.macs_before == dense


# -- look, edit, apply ---------------------------------------------------------------------------------------------


def test_a_plan_is_written_edited_and_taken_by_convert_and_train_py(capsys, tmp_path):
    path = tmp_path / "plan.json"
    # the data of tiny runs: 8 x 8 in 4 classes
    argv = (*SMALL, "--num-classes", "4", "--ranks", "3", "--n-modes", "1", "-o", path)
    code, out, err = call(capsys, *argv)
    assert (code, err) == (0, "")
    assert f"hodec train model=resnet20 data.image_size=8 plan={path} init=WEIGHTS" in out
    assert f'hodec.Plan.load("{path}")' in out

    value = json.loads(path.read_text())
    value["layers"]["layer3.0.conv2"]["ranks"] = [2, 5]
    value["skipped"]["conv1"] = "by hand"
    value["layers"].pop("conv1", None)
    path.write_text(json.dumps(value))
    plan = Plan.load(path)
    assert plan["layer3.0.conv2"].ranks == (2, 5)
    small = convert(resnet20(num_classes=4), plan)
    assert count_cost(small, X).params == plan.params_after

    metrics = run(
        tiny(model={"name": "resnet20"}, plan=str(path), tt_ranks=None, dense_epochs=1, retrain_epochs=0),
        tmp_path / "run",
    )
    assert metrics["compressed"]["params"] == plan.params_after
    assert metrics["compressed"]["macs"] == plan.macs_after
    assert Plan.load(tmp_path / "run" / "plan.json") == plan


def test_a_torchvision_net_is_named_as_train_py_names_it(capsys, tmp_path):
    argv = ("--model", "torchvision/squeezenet1_1", "--image-size", "64", "--ranks", "{*.expand3x3:8}")
    code, out, _ = call(capsys, *argv, "-o", tmp_path / "plan.json")
    assert code == 0
    assert "hodec train model=torchvision model.name=squeezenet1_1 data.image_size=64 plan=" in out


def test_a_file_that_is_there_is_overwritten_with_force_only(capsys, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("mine")
    code, out, err = call(capsys, *SMALL, "--ranks", "3", "-o", path)
    assert (code, out) == (2, "")
    assert err == f"hodec plan: -o: {path} exists; another name, or --force to overwrite it\n"
    assert path.read_text() == "mine"
    code, _, _ = call(capsys, *SMALL, "--ranks", "3", "-o", path, "--force")
    assert code == 0
    assert set(Plan.load(path)) >= {"layer1.0.conv1"}


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "resnet33"), "--model 'resnet33' is unknown. Did you mean: resnet34"),
        (("--model", "inception_v3", "--image-size", "32"), "does not take images of 32x32: set --image-size 75"),
        ((*SMALL[:2], "--image-size", "0"), "--image-size: '0' given; allowed: a whole number at least 1"),
        ((*SMALL, "--in-channels", "rgb"), "--in-channels: 'rgb' given; allowed: a whole number at least 1"),
        ((*SMALL, "--num-classes", "-1"), "--num-classes: '-1' given; allowed: a whole number at least 1"),
        ((*SMALL, "--weights", "missing.pt"), "--weights: missing.pt: no such file"),
        ((*SMALL, "--weights", "text.pt"), "--weights: text.pt: not readable as weights"),
        ((*SMALL, "--method", "tuker"), "--method: 'tuker' given; allowed: tt | "),
        ((*SMALL, "--rule", "greedy"), "--rule: greedy is not possible here"),
        ((*SMALL, "--rule", "amct"), "amct chooses ranks for --method spatial_svd only"),
        ((*SMALL, "--macs", "0.001"), "--macs 0.001 (least reachable: 0."),
        ((*SMALL, "--ranks", "{layer9.*:3}"), "--ranks 'layer9.*' matches no layer"),
        ((*SMALL, "--ranks", "[3,4]"), "needs 4 ranks, got 2"),
        ((*SMALL, "--include", "layr1.*"), "--include 'layr1.*' matches no layer"),
        ((*SMALL, "-o", "."), "-o: '.' given; allowed: a file in a folder that exists"),
        ((*SMALL, "-o", "none/plan.json"), "-o: 'none/plan.json' given"),
        ((*SMALL, "--force"), "--force: given without -o FILE"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(capsys, caplog, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("no weights")
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("hodec plan: ")
    assert message in err
    assert err.count("\n") == 1
    assert not caplog.records


def test_weights_with_other_classes_say_which_option(capsys, weights):
    code, _, err = call(capsys, *SMALL, "--num-classes", "7", "--weights", weights)
    assert code == 2
    assert "Build the model with the file's --num-classes" in err


def test_the_plan_is_the_same_every_time_and_moves_no_random_numbers(capsys):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = call(capsys, *SMALL, "--rule", "energy", "--keep", "0.8", "--json")[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert call(capsys, *SMALL, "--rule", "energy", "--keep", "0.8", "--json")[1] == first


def test_no_model_is_wrong_usage(capsys):
    assert call(capsys)[::2] == (2, "hodec plan: what is to be planned? allowed: one of MODEL.onnx and --model NAME\n")


def test_errors_are_those_of_hodec():
    from hodec.cli import plan

    options = cli.parser().parse_args(["plan", "--model", "resnet20", "--macs", "7"])
    with pytest.raises(HodecError, match="--macs"):
        plan.run(options)


def test_a_place_that_is_no_file_or_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("place")
        code, _, err = call(capsys, *SMALL, "--ranks", "3", "-o", "place", "--force")
    assert (code, err) == (2, "hodec plan: -o: place is no file that could be replaced; name another one\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hodec.plan.plan.write_json", full)
    code, _, err = call(capsys, *SMALL, "--ranks", "3", "-o", "plan.json")
    assert code == 2
    assert err.endswith(
        "plan.json could not be written: there is no space left; make room there or give another path\n"
    )
