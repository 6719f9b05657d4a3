"""State is float32, plain, and whole: a fit that was stopped and resumed is the fit that was not."""

from collections import OrderedDict

import pytest
import pytorch_lightning as pl
import torch
from admm_fits import LAYERS, Users, admm, batches, cosine, fit, new_net, samples, sgd
from torch.testing import assert_close

from hodec.admm.stopping import Status
from hodec.errors import CheckpointError
from hodec.experiment.data.images import TensorSplit
from hodec.experiment.data.loaders import TensorLoader
from hodec.experiment.data.options import Cifar10

EPOCHS = 4


def scheduled(module):
    return cosine(sgd(module), 4 * EPOCHS)


def adamw(module):
    return cosine(torch.optim.AdamW(module.parameters(), lr=1e-3), 4 * EPOCHS)


def keep(folder, **when):
    return pl.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, filename="{step}", auto_insert_metric_name=False, **when
    )


class Reseed(pl.Callback):
    """Dropout's draws as a function of the step, as a user who wants exact resumes would do."""

    def on_train_batch_start(self, trainer, *rest):
        torch.manual_seed(1000 + trainer.global_step)


def stateful_batches():
    """Batches that know where they are: a resume within an epoch goes on with the next one."""
    x, y = samples()
    images = ((x - x.min()) / (x.max() - x.min()) * 255).to(torch.uint8)
    option = Cifar10(batch_size=8, augment=False, mean=[0.5], std=[0.25])
    return TensorLoader(TensorSplit(images, y), option, seed=0, train=True)


def run(folder, *, optimizer=scheduled, resume=None, rho="auto", ranks=3, data=None, every=1, **when):
    net = new_net()
    callback = admm(net, rho, ranks=ranks, update_every=every, tolerance=0.0)
    kept = keep(folder, **(when or {"every_n_epochs": 1, "save_on_train_epoch_end": True}))
    fit(
        Users(net, optimizer),
        Reseed(),
        callback,
        kept,
        epochs=EPOCHS,
        resume=resume,
        data=data() if data else batches(),
        enable_checkpointing=True,
    )
    return net, callback


def assert_same(one, other):
    """Two nets with their callbacks, bit for bit."""
    (net, callback), (net2, callback2) = one, other
    assert_close(net2.state_dict(), net.state_dict(), rtol=0, atol=0)
    for name in LAYERS:
        mine, theirs = callback.admm.states[name], callback2.admm.states[name]
        assert_close((theirs.z, theirs.u), (mine.z, mine.u), rtol=0, atol=0)
        assert theirs.rho == mine.rho
    assert (callback2.admm.primal, callback2.admm.dual) == (callback.admm.primal, callback.admm.dual)
    assert callback2.admm.residuals == callback.admm.residuals
    assert (callback2.admm.status, callback2.admm.updated_at) == (callback.admm.status, callback.admm.updated_at)


@pytest.mark.parametrize("optimizer", [scheduled, adamw])
@pytest.mark.parametrize("rho", ["auto", "balanced", {0: 0.1, 2: 1.0}])
def test_resume_at_the_end_of_an_epoch_is_exact(tmp_path, rho, optimizer):
    whole = run(tmp_path / "whole", rho=rho, optimizer=optimizer)
    assert len(whole[1].admm.primal) == EPOCHS
    for step in (4, 8):
        resumed = run(tmp_path / f"from{step}", rho=rho, optimizer=optimizer, resume=tmp_path / f"whole/{step}.ckpt")
        assert_same(whole, resumed)


@pytest.mark.parametrize("optimizer", [scheduled, adamw])
@pytest.mark.parametrize("every", [1, "3steps"])
def test_resume_within_an_epoch_is_exact(tmp_path, every, optimizer):
    settings = {"every": every, "optimizer": optimizer, "data": stateful_batches, "every_n_train_steps": 1}
    whole = run(tmp_path / "whole", **settings)
    for step in (1, 3, 4, 6):  # the first epoch ends with step 4
        assert_same(whole, run(tmp_path / f"from{step}", resume=tmp_path / f"whole/{step}.ckpt", **settings))


def test_a_checkpoint_of_an_older_version_is_gone_on_from(tmp_path):
    """hodec 0.1.0 left steps and epochs to Lightning."""
    whole = run(tmp_path / "whole")
    content = torch.load(tmp_path / "whole/8.ckpt", weights_only=True)
    for key in ("steps", "epoch", "epoch_began", "steps_per_epoch", "expected", "pulls", "pulling", "parked"):
        del content["callbacks"]["AdmmCallback"][key]
    torch.save(content, tmp_path / "old.ckpt")
    assert_same(whole, run(tmp_path / "again", resume=tmp_path / "old.ckpt"))


def test_resume_when_every_epoch_is_done_leaves_all_as_it_is(tmp_path):
    whole = run(tmp_path / "whole")
    assert_same(whole, run(tmp_path / "again", resume=tmp_path / f"whole/{4 * EPOCHS}.ckpt"))
    assert whole[1].admm.status is Status.EPOCHS_ENDED


PLAIN = (bool, int, float, str, type(None))


def assert_plain(value):
    if isinstance(value, dict | list):
        assert type(value) in (dict, list, OrderedDict)
        for one in value.values() if isinstance(value, dict) else value:
            assert_plain(one)
    else:
        assert type(value) in (*PLAIN, torch.Tensor), type(value)


def test_checkpoints_hold_plain_values_and_load_without_running_code(tmp_path):
    _, callback = run(tmp_path)
    content = torch.load(tmp_path / "8.ckpt", weights_only=True)
    state = content["callbacks"]["AdmmCallback"]
    assert state["layers"].keys() == set(LAYERS)
    assert_plain(callback.state_dict())


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"conv*": 3, "fc1": 2}, r"1 layers differ, first fc1 .*ranks \[3\].*ranks \[2\]"),
        ({"conv*": 3}, "1 layers differ, first fc1 .*plan: without it"),
        ({"conv*": 3, "fc1": 3, "head": 1}, "1 layers differ, first head .*checkpoint: without it"),
    ],
)
def test_row_31_resume_with_another_plan_is_refused(tmp_path, ranks, words):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=f"of another plan: {words}"):
        run(tmp_path / "other", ranks=ranks, resume=tmp_path / "4.ckpt")


def test_resume_of_a_converged_fit_ends_at_once(tmp_path):
    """Killed between its last checkpoint and what comes after it: going on must not train any further."""
    net = new_net()
    fit(
        Users(net, scheduled),
        admm(net, tolerance=10.0),
        keep(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True),
        epochs=EPOCHS,
        enable_checkpointing=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["4.ckpt"], "it should have stopped after one epoch"
    again = new_net()
    callback = admm(again, tolerance=10.0)
    fit(Users(again, scheduled), callback, epochs=EPOCHS, resume=tmp_path / "4.ckpt")
    assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert callback.admm.status is Status.CONVERGED


def test_a_second_fit_of_the_same_callback_begins_anew():
    net, second, alone = new_net(), new_net(1), new_net(1)
    callback = admm(net)
    fit(Users(net), callback, epochs=2)
    for other, used in ((second, callback), (alone, admm(alone))):
        torch.manual_seed(0)
        fit(Users(other), used, epochs=2)
        assert len(used.admm.primal) == 2
    assert_close(second.state_dict(), alone.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_state_is_full_precision_whatever_trains(precision):
    net = new_net()
    callback = admm(net, track_truncated=True)
    trainer = fit(Users(net), callback, epochs=2, val=batches(), precision=precision)
    kept = torch.float64 if precision == "64-true" else torch.float32
    for name in LAYERS:
        state = callback.admm.states[name]
        assert {state.z.dtype, state.u.dtype} == {kept}
        assert state.u.abs().max() > 0
    assert 0 <= trainer.callback_metrics["admm/truncated_accuracy"] <= 1


def test_bf16_training_is_pulled_as_float32_is():
    residual = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        net = new_net()
        callback = admm(net, pull=0.9)
        fit(Users(net, scheduled), callback, epochs=3, precision=precision)
        residual[precision] = callback.admm.primal[-1]
    assert residual["bf16-mixed"] == pytest.approx(residual["32-true"], rel=0.05)
    assert residual["bf16-true"] == pytest.approx(residual["32-true"], rel=0.1)
