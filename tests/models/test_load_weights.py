import copy
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hodec.errors import CheckpointError
from hodec.models import build_model, load_weights


def net(name="resnet20", classes=10):
    return build_model(name, in_channels=3, num_classes=classes)


def small(outputs=3, width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, outputs))


def assert_same(model, state):
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


@pytest.fixture
def refused():
    """Assert that a file is refused with one message, and that the model stays as it was."""

    def check(model, path, *words, **settings):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError) as error:
            load_weights(model, path, **settings)
        assert_same(model, before)
        for word in (str(path), *words):
            assert word in str(error.value), str(error.value)
        assert "\n" not in str(error.value)

    return check


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth"])
def test_round_trip(tmp_path, suffix):
    state, path = net().state_dict(), tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = net()
    load_weights(model, str(path))
    assert_same(model, state)


@pytest.mark.parametrize("prefix", ["net.", "model.", "module.", "net._orig_mod."])
def test_prefix_of_a_wrapper_is_dropped(tmp_path, prefix):
    state, path = net().state_dict(), tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": {prefix + key: value for key, value in state.items()}}, path)
    model = net()
    load_weights(model, path)
    assert_same(model, state)


def test_tensors_outside_the_prefix_are_left_aside_and_said(tmp_path, caplog):
    state, path = small().state_dict(), tmp_path / "last.ckpt"
    content = {f"net.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": content}, path)
    model = small()
    with caplog.at_level("INFO"):
        load_weights(model, path)
    assert_same(model, state)
    assert "1 tensors outside 'net.'" in caplog.text


def test_two_copies_of_the_model_in_one_file_are_ambiguous(tmp_path, refused):
    state = small().state_dict()
    twice = {f"{prefix}.{key}": value for prefix in ("net", "teacher") for key, value in state.items()}
    torch.save({"state_dict": twice}, tmp_path / "two.ckpt")
    refused(small(), tmp_path / "two.ckpt", "net.", "teacher.", "2 times")


def test_lacking_batchnorm_counters_become_zero(tmp_path):
    source, model = small(), small()
    source(torch.randn(2, 1, 3, 3))
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "w.pt")
    model[1].num_batches_tracked.fill_(7)
    load_weights(model, tmp_path / "w.pt")
    assert model[1].num_batches_tracked == 0
    assert_same(model, source.state_dict() | {"1.num_batches_tracked": torch.tensor(0)})


def test_half_precision_file_fills_a_float_model(tmp_path):
    state = {key: value.half() for key, value in small().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    model = small()
    load_weights(model, tmp_path / "w.pt")
    assert model[0].weight.dtype == torch.float32
    torch.testing.assert_close(model[0].weight, state["0.weight"].float(), rtol=0, atol=0)


def test_missing_file(tmp_path, refused):
    refused(small(), tmp_path / "none.ckpt", "no such file")


def test_unknown_suffix(tmp_path, refused):
    (tmp_path / "w.onnx").write_bytes(b"x")
    refused(small(), tmp_path / "w.onnx", ".safetensors", ".pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_empty_file(tmp_path, refused, suffix):
    path = tmp_path / f"w{suffix}"
    path.touch()
    refused(small(), path, "empty")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_text_file(tmp_path, refused, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_text("<html>not found</html>\n" * 20)
    refused(small(), path, "not readable")


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_truncated_file(tmp_path, refused, suffix, kept):
    path, state = tmp_path / f"w{suffix}", small().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(small(), path, "not readable")


def test_flipped_bit_in_a_zip_file(tmp_path, refused):
    path, model = tmp_path / "w.pt", small()
    torch.save(model.state_dict(), path)
    data = bytearray(path.read_bytes())
    spot = data.index(model[0].weight.detach().numpy().tobytes())
    data[spot] ^= 1
    path.write_bytes(bytes(data))
    refused(small(), path, "not readable", "checksum")


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran code')",))


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        (lambda w: w.to(torch.complex64), "complex"),
        (lambda w: (100 * w).to(torch.int8), "integer"),
        (lambda w: w > 0, "truth"),
        (lambda w: w.to_sparse(), "sparse"),
        (lambda w: w.to("meta"), "absent"),
    ],
)
def test_weights_of_another_kind_of_number_are_refused(tmp_path, refused, changed, kind):
    """Copied all the same, they are other weights: imaginary parts, scales and fractions are lost without a word."""
    state, path = small().state_dict(), tmp_path / "w.pt"
    state["0.weight"] = changed(state["0.weight"])
    torch.save(state, path)
    refused(small(), path, f"0.weight: {kind} numbers", "real in the model")


def test_files_without_tensors_and_names_that_are_too_long_are_refused(tmp_path, refused):
    save_file({}, tmp_path / "w.safetensors")
    refused(small(), tmp_path / "w.safetensors", "no tensors")
    refused(small(), tmp_path / ("x" * 5000 + ".pt"), "no such file")


def test_an_archive_that_unpacks_to_more_than_it_holds_is_not_unpacked(tmp_path, monkeypatch, refused):
    path = tmp_path / "bomb.pt"
    torch.save(small().state_dict(), path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", b"\0" * 10**7)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    refused(small(), path, "not readable", "unpack to 10,")


def test_code_in_a_file_is_not_run(tmp_path, refused):
    torch.save({"state_dict": Harmful()}, tmp_path / "w.ckpt")
    refused(small(), tmp_path / "w.ckpt", "not readable")
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Harmful()))
    refused(small(), tmp_path / "w.pt", "not readable")


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {}, {"state_dict": {"a": 1.0}}])
def test_file_without_named_tensors(tmp_path, refused, content):
    torch.save(content, tmp_path / "w.pt")
    refused(small(), tmp_path / "w.pt", "state_dict()")


def test_another_model_says_how_many_fit_and_which_differ(tmp_path, refused):
    torch.save(net("resnet20").state_dict(), tmp_path / "w.pt")
    refused(net("resnet32"), tmp_path / "w.pt", "another model", " of ", "layer1.3", "not in the file")
    torch.save(small(width=6).state_dict(), tmp_path / "w.pt")
    refused(small(), tmp_path / "w.pt", "1 of 8 tensors fit", "0.weight: (6, 1, 3, 3) in the file, (4, 1, 3, 3)")
    torch.save({**small().state_dict(), "extra": torch.ones(1)}, tmp_path / "w.pt")
    refused(small(), tmp_path / "w.pt", "8 of 8 tensors fit", "extra: not in the model")


def test_another_model_below_a_prefix_is_compared_without_it(tmp_path, refused):
    state = {f"net.{key}": value for key, value in net("resnet20").state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    refused(net("resnet32"), tmp_path / "w.ckpt", "97 of 157 tensors fit", "layer1.3.conv1.weight: not in the file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_numbers_that_are_not_finite(tmp_path, refused, suffix, value):
    state, path = small().state_dict(), tmp_path / f"w{suffix}"
    state["3.weight"][1, 2] = value
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    refused(small(), path, "NaN or infinity", "3.weight")


def test_other_number_of_classes_needs_consent(tmp_path, refused, caplog):
    source, path = small(outputs=5), tmp_path / "w.pt"
    torch.save(source.state_dict(), path)
    refused(small(outputs=3), path, "num_classes", "allow_new_head=True", "(5, 4) in the file")
    model = small(outputs=3)
    head = copy.deepcopy(model[3].state_dict())
    with caplog.at_level("INFO"):
        load_weights(model, path, allow_new_head=True)
    torch.testing.assert_close(model[0].weight, source[0].weight, rtol=0, atol=0)
    assert_same(model[3], head)
    assert "starts anew" in caplog.text


def test_consent_to_a_new_head_covers_nothing_else(tmp_path, refused):
    torch.save(small(width=6, outputs=5).state_dict(), tmp_path / "w.pt")
    refused(small(), tmp_path / "w.pt", "another model", allow_new_head=True)


def test_head_that_fits_is_loaded_in_spite_of_consent(tmp_path):
    source, model = small(), small()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt", allow_new_head=True)
    assert_same(model, source.state_dict())
