"""Between two Z-updates, a step of ADMM does not wait for the device."""

import pytest
import torch
from admm_fits import BATCHES, Users, admm, cosine, fit, new_net, sgd

from hodec.admm.lightning import AdmmCallback

from host_looks import HostLooks  # isort: skip

EPOCHS = 2


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=1e-2)


def scheduled(module):
    """The learning rate moves at each step, and rho and U with it."""
    return cosine(sgd(module), EPOCHS * BATCHES)


@pytest.fixture
def looks(monkeypatch):
    """What the host looked at in each call of the two hooks of a step."""
    seen = []

    def watched(hook):
        def call(*given):
            with HostLooks() as looked:
                hook(*given)
            seen.append(looked)

        return call

    for name in ("on_before_optimizer_step", "on_train_batch_end"):
        monkeypatch.setattr(AdmmCallback, name, watched(getattr(AdmmCallback, name)))
    return seen


@pytest.mark.parametrize("rho", ["auto", "balanced", 0.01])
@pytest.mark.parametrize("make_optimizer", [sgd, adam, scheduled])
def test_a_step_does_not_look_at_a_number(looks, make_optimizer, rho):
    net = new_net()
    callback = admm(net, rho, update_every="1000steps")
    fit(Users(net, make_optimizer), callback, epochs=EPOCHS)
    assert callback.admm.primal == []  # no Z-update took place
    assert len(looks) == 2 * EPOCHS * BATCHES
    assert [one.found for one in looks] == [[]] * len(looks)
    assert sum(one.operations for one in looks) > 2 * EPOCHS * BATCHES  # though they did their work


def test_a_z_update_does_look(looks):
    """So that the test above can fail: residuals are numbers on the host."""
    net = new_net()
    fit(Users(net, sgd), admm(net, update_every=1), epochs=1)
    assert [bool(one.found) for one in looks] == [False] * (2 * BATCHES - 1) + [True]
