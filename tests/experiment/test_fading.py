"""Retraining that begins with the dense net: what conversion cut off fades out, and no file knows of it."""

import logging

import pytest
import torch
from pytorch_lightning import Callback
from tiny_runs import DATA, killed_at, stopped_before, tiny
from train_script import result, rows

import hodec
from hodec.errors import ConfigError
from hodec.experiment import pipeline, training
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import val_loader
from hodec.experiment.lit import LitClassifier, evaluate
from hodec.io.tensors import load_tensors
from hodec.models import build_model

LENGTHS = {"dense_epochs": 1, "retrain_epochs": 3, "admm": {"name": "off"}}
FADING = tiny(**LENGTHS, fade_epochs=2, trainer={"checkpoint_minutes": 1e-9})  # a checkpoint after each batch


@pytest.fixture(scope="module")
def faded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faded") / "run"
    return folder, pipeline.run(FADING, folder)


@pytest.fixture
def batches(monkeypatch):
    """Of each training batch the phase's net in training mode, as it was before: (images, scores, statistics)."""
    seen, real = [], LitClassifier._trained

    def keeping(module, x):
        statistics = {name: buffer.clone() for name, buffer in module.net.named_buffers()}
        scores = real(module, x)
        seen.append((x, scores.detach(), statistics))
        return scores

    monkeypatch.setattr(LitClassifier, "_trained", keeping)
    return seen


def numbers(folder):
    """The rows without the seconds they took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def of_retraining(folder):
    return [row for row in rows(folder) if row["phase"] == "retrain"]


def test_the_share_falls_to_0_in_a_line(faded):
    shares = [row.get("fade/share") for row in of_retraining(faded[0])]
    assert shares == [0.5, 0.0, None]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_share_falls_with_each_step(tmp_path, monkeypatch, accumulated):
    """Three batches an epoch, the last of which is a step of its own where two are gathered."""
    shares, real = [], hodec.FadeIn.step
    monkeypatch.setattr(hodec.FadeIn, "step", lambda fade, share: (shares.append(share), real(fade, share)))
    lengths = LENGTHS | {"retrain_epochs": 1}
    pipeline.run(tiny(**lengths, fade_epochs=1, trainer={"accumulate_grad_batches": accumulated}), tmp_path)
    before = {1: [1, 2 / 3, 1 / 3], 2: [1, 1, 1 / 2]}[accumulated]
    after = [*before[1:], 0]
    assert shares == pytest.approx([0, *(share for pair in zip(before, after, strict=True) for share in pair)])


def test_retraining_begins_with_the_dense_net(tmp_path, batches):
    pipeline.run(tiny(**LENGTHS | {"retrain_epochs": 1}, fade_epochs=1), tmp_path)
    x, scores, statistics = batches[3]  # the first batch behind the three of the dense training
    dense = build_model("resnet8", in_channels=3, num_classes=DATA.fake_classes)
    dense.load_state_dict(load_tensors(tmp_path / "phases" / "dense.safetensors"))
    for name, buffer in dense.named_buffers():
        assert torch.equal(buffer, statistics[name])
    torch.testing.assert_close(scores, dense.train()(x), atol=1e-4, rtol=1e-4)


def test_every_file_is_of_the_plain_net(faded, tmp_path):
    folder, metrics = faded
    plain = pipeline.run(tiny(**LENGTHS), tmp_path / "plain")
    assert plain["weights_sha256"] != metrics["weights_sha256"]
    assert plain["truncated"] == metrics["truncated"]
    for name in ("phases/retrain.safetensors", "compressed.safetensors"):
        one, other = (load_tensors(run / name) for run in (folder, tmp_path / "plain"))
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}
    kept = [run / "checkpoints" / "retrain.ckpt" for run in (folder, tmp_path / "plain")]
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in kept)
    assert one.keys() == other.keys()
    small = hodec.load(folder / "compressed.safetensors")
    accuracy = evaluate(small, val_loader(build_data(DATA), device=torch.device("cpu")))
    assert accuracy == metrics["compressed"]["validation_accuracy"] == of_retraining(folder)[-1]["val/accuracy"]


@pytest.mark.parametrize(
    "write", [2, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 26) if n not in (2, 8))]
)
def test_killed_while_it_fades(faded, tmp_path, monkeypatch, write):
    folder = stopped_before("retrain", faded[0], tmp_path / "run")
    for path in (folder / "checkpoints").glob("retrain*"):
        path.unlink()
    assert killed_at(FADING, folder, write, monkeypatch)
    pipeline.run(FADING, folder)
    assert result(folder) == result(faded[0])
    assert numbers(folder) == numbers(faded[0])


def test_a_run_that_was_killed_after_its_last_epoch(faded, tmp_path):
    folder = stopped_before("retrain", faded[0], tmp_path / "run")
    assert (folder / "checkpoints" / "retrain.ckpt").exists()
    pipeline.run(FADING, folder)
    assert result(folder) == result(faded[0])


def test_a_run_from_a_stage_fades_as_well(faded, tmp_path):
    """And one that does not fade may begin there."""
    stage = {"init_stage": str(faded[0] / "truncated"), "trainer": {"checkpoint_minutes": 1e-9}}
    pipeline.run(tiny(**LENGTHS, fade_epochs=2, **stage), tmp_path / "same")
    assert result(tmp_path / "same") == result(faded[0])
    pipeline.run(tiny(**LENGTHS, **stage), tmp_path / "other")
    assert not any("fade/share" in row for row in rows(tmp_path / "other"))


def test_a_finished_run_trains_on(tmp_path):
    same = LENGTHS | {"fade_epochs": 1, "optimizer": {"schedule": "constant"}}
    pipeline.run(tiny(**same), tmp_path / "long")
    pipeline.run(tiny(**same | {"retrain_epochs": 2}), tmp_path / "run")
    pipeline.run(tiny(**same), tmp_path / "run")
    assert result(tmp_path / "run") == result(tmp_path / "long")


class Ends(Callback):
    """Ends the training after its first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_retraining_that_somebody_ends_early_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(training, "own_callbacks", lambda settings: [Ends()])
    with caplog.at_level(logging.WARNING):
        metrics = pipeline.run(tiny(**LENGTHS, fade_epochs=2), tmp_path)
    assert "ended with 50 % of what conversion cut off still in the net, which has gone now: give fewer" in caplog.text
    small = hodec.load(tmp_path / "compressed.safetensors")
    assert evaluate(small, val_loader(build_data(DATA), device=torch.device("cpu"))) == pytest.approx(
        metrics["compressed"]["validation_accuracy"]
    )


def test_what_cannot_fade_is_refused():
    with pytest.raises(ConfigError, match="fade_epochs: more given than retrain_epochs"):
        tiny(fade_epochs=3, retrain_epochs=2)
    with pytest.raises(ConfigError, match=r"fade_epochs: given with trainer\.compile"):
        tiny(fade_epochs=1, trainer={"compile": True})
    with pytest.raises(ConfigError, match=r"fade_epochs: -1 given"):
        tiny(fade_epochs=-1)
