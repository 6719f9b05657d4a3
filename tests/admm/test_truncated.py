"""Measuring the truncated net leaves no trace in the training, and measures what it says."""

import pytest
import torch
from admm_fits import LAYERS, Users, admm, batches, fit, new_net, plan_of, samples
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from hodec.admm.updates import weights_replaced


def trained(track, **options):
    torch.manual_seed(0)
    net = new_net()
    callback = admm(net, track_truncated=track, **options)
    fit(Users(net), callback, epochs=3, data=batches(shuffle=True), val=batches(shuffle=False))
    return net, torch.get_rng_state()


def test_training_is_bit_for_bit_the_one_without_it():
    """Dropout and shuffling draw from the global generator; one draw more or less would show."""
    (net, random), (other, other_random) = trained(True), trained(False)
    assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert torch.equal(random, other_random)


class Modes(Users):
    """Part of the net is in evaluation mode on purpose."""

    def on_train_epoch_start(self):
        self.backbone.dropout.eval()

    def on_train_batch_start(self, batch, index):
        self.seen = {name: m.training for name, m in self.named_modules()}


def test_modes_are_as_they_were():
    net = new_net()
    module = Modes(net)
    fit(module, admm(net, track_truncated=True), epochs=2, val=batches())
    assert module.seen["backbone.dropout"] is False
    assert module.seen["backbone.conv1"] is True


def accuracy(net, x, y):
    with torch.no_grad():
        return float((net.eval()(x).argmax(1) == y).double().mean())


def test_it_is_the_accuracy_of_the_truncated_net():
    net = new_net()
    callback = admm(net, ranks=1, track_truncated=True)
    fit(Users(net), callback, epochs=2, val=batches())
    reported = callback.latest["admm/truncated_accuracy"]
    for name, layer in plan_of(net, 1).items():
        w = net.get_submodule(name).weight
        w.data.copy_(layer.project(w.detach()))
    assert reported == accuracy(net, *samples())


def test_weights_come_back_even_after_an_error():
    net = new_net()
    weights = {name: net.get_submodule(name).weight for name in LAYERS}
    before = {name: w.detach().clone() for name, w in weights.items()}

    def fail_within():
        with weights_replaced(weights, {name: torch.zeros_like(w) for name, w in before.items()}):
            assert not net.conv1.weight.any()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_within()
    for name in LAYERS:
        assert torch.equal(weights[name], before[name])


def reported(module, net, val, **options):
    callback = admm(net, track_truncated=True, **options.pop("admm", {}))
    fit(module, callback, val=val, **options)
    return callback.latest.get("admm/truncated_accuracy")


def test_without_validation_data_nothing_is_reported():
    net = new_net()
    assert reported(Users(net), net, None) is None


@pytest.mark.parametrize("kind", ["regression", "three parts", "soft labels"])
def test_batches_that_are_not_images_and_labels_are_left_alone(kind):
    x, y = samples()
    soft = nn.functional.one_hot(y, 5).float()
    sets = {"regression": (x, y.float()), "three parts": (x, y, y), "soft labels": (x, soft)}

    class Other(Users):
        def validation_step(self, batch, index):
            return None

    net = new_net()
    assert reported(Other(net), net, DataLoader(TensorDataset(*sets[kind]), batch_size=8)) is None


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_one_score_for_two_classes_is_no_accuracy_that_could_be_told(shape, caplog):
    class OneScore(Users):
        def forward(self, x):
            return super().forward(x)[:, 0].reshape(shape)

        def loss(self, batch):
            x, y = batch
            return nn.functional.binary_cross_entropy_with_logits(self(x).flatten(), (y > 2).float())

        def training_step(self, batch, index):
            return self.loss(batch)

        def validation_step(self, batch, index):
            return None

    net, (x, y) = new_net(), samples()
    assert reported(OneScore(net), net, DataLoader(TensorDataset(x, (y > 2).long()), batch_size=8)) is None
    assert "is no scores (images, classes); give evaluate=" in caplog.text


def test_the_users_own_measure_is_taken():
    net = new_net()
    assert reported(Users(net), net, None, admm={"evaluate": lambda module: 0.125}) == 0.125


def test_no_more_batches_than_validation_takes():
    seen = []

    class Counting(Users):
        def forward(self, x):
            if not self.training and not torch.is_grad_enabled():
                seen.append(len(x))
            return super().forward(x)

    net = new_net()
    reported(Counting(net), net, batches(), limit_val_batches=2)
    assert len(seen) == 2 + 2, "two of Lightning's validation, two of the measurement"


def still(module):
    return torch.optim.SGD(module.parameters(), lr=0.0)


def test_several_validation_sets_are_pooled():
    class Two(Users):
        def validation_step(self, batch, index, dataloader_idx=0):
            return None

    net = new_net()
    x, y = samples()
    parts = ((x[:8], y[:8]), (x[8:], y[8:]))
    pooled = reported(Two(net, still), net, [DataLoader(TensorDataset(*part), batch_size=5) for part in parts])
    same = new_net()
    assert pooled == reported(Users(same, still), same, batches())
