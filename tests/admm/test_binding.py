"""The planned net is found in any module, or the message says what stands in the way and what to do."""

import logging

import pytest
import pytorch_lightning as pl
import torch
from admm_fits import LAYERS, Users, admm, batches, fit, new_net, plan_of, sgd
from torch import nn

import hodec
from hodec.admm.binding import check_trainer, find_root, planned_weights
from hodec.admm.core import Admm
from hodec.admm.lightning import AdmmCallback
from hodec.errors import PlanError, TrainingError
from hodec.ranks import make_plan


class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def root_of(module, root=None):
    return find_root(module, plan_of(new_net()), root)


def test_the_net_is_found_wherever_it_hangs():
    net = new_net()
    assert root_of(net) == ""
    assert root_of(Holder(backbone=net, extra=nn.Linear(2, 2))) == "backbone."
    assert root_of(Holder(a=Holder(b=net))) == "a.b."


def test_two_such_nets_need_a_root():
    both = Holder(teacher=new_net(1), student=new_net())
    with pytest.raises(PlanError, match=r"several places: 'student', 'teacher'; .*root='student'"):
        root_of(both)
    assert root_of(both, "teacher") == "teacher."
    weights = planned_weights(both, plan_of(new_net()), "student.")
    assert {name: id(w) for name, w in weights.items()} == {
        name: id(both.student.get_submodule(name).weight) for name in LAYERS
    }


def test_one_net_under_two_names_is_one_place():
    net = new_net()
    module = Holder(features=net, model=Holder(body=net))
    root = root_of(module)
    assert planned_weights(module, plan_of(net), root)["fc1"] is net.fc1.weight


def test_a_layer_that_hangs_elsewhere_too_is_still_found():
    """torch lists a shared weight under its first name only."""
    net = new_net()
    assert root_of(Holder(stem=net.conv1, model=net)) == "model."


@pytest.mark.parametrize("wrap", ["whole", "inside"])
def test_compiled_nets_keep_their_names(wrap):
    net = new_net()
    compiled = torch.compile(net, backend="eager")
    module = Holder(backbone=compiled) if wrap == "inside" else compiled
    root = root_of(module)
    assert root == ("backbone." if wrap == "inside" else "")
    assert planned_weights(module, plan_of(net), root)["conv2"] is net.conv2.weight


def test_a_net_that_lacks_planned_layers_is_refused():
    with pytest.raises(PlanError, match=r"no part of Sequential has all planned layers .*first is conv1.*root='\.\.'"):
        root_of(nn.Sequential(nn.Linear(3, 3)))
    other = new_net()
    other.fc1 = nn.Linear(48, 16)
    with pytest.raises(PlanError, match="planned layers with the planned shapes"):
        root_of(Holder(net=other))
    with pytest.raises(PlanError, match=r"Did you mean: net\.conv1, net\.conv2"):
        root_of(Holder(net=new_net()), "nett")


def test_a_plan_without_layers_is_refused():
    with pytest.raises(PlanError, match="no layers.*leave it out"):
        find_root(new_net(), {}, None)


def freeze(net, *names):
    for name in names:
        net.get_submodule(name).requires_grad_(False)
    return net


def only_trainable(module):
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("optimizer", [sgd, only_trainable])
def test_frozen_layers_are_left_out_with_one_warning(caplog, optimizer):
    net = freeze(new_net(), "conv1", "fc1")
    before = net.conv1.weight.clone()
    callback = admm(net)
    fit(Users(net, optimizer), callback, epochs=2)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "frozen" in r.getMessage()]
    assert warnings == ["frozen layers take no part in ADMM: conv1, fc1"]
    assert callback.admm.states.keys() == {"conv2"}
    assert torch.equal(net.conv1.weight, before)


def test_a_layer_outside_the_optimizer_is_left_out():
    net = new_net()
    callback = admm(net)
    fit(Users(net, lambda module: torch.optim.SGD(module.backbone.fc1.parameters(), lr=0.1)), callback)
    assert callback.admm.states.keys() == {"fc1"}


def test_where_all_layers_are_frozen_admm_waits_and_says_so(caplog):
    net = freeze(new_net(), *LAYERS)
    callback = admm(net)
    fit(Users(net, only_trainable), callback)
    assert not callback.admm.states
    assert "all planned layers are frozen: ADMM waits until one is trained" in caplog.messages


def test_an_optimizer_without_any_planned_weight_is_refused():
    net = new_net()
    with pytest.raises(TrainingError, match="has none of the 3 planned layers .*give it their weights"):
        fit(Users(net, lambda module: torch.optim.SGD(module.backbone.head.parameters(), lr=0.1)), admm(net))


class Unused(Users):
    """The head alone learns: the planned layers get no gradient."""

    def forward(self, x):
        return self.backbone.head(x.flatten(1)[:, :12])


def test_layers_that_the_loss_does_not_reach_are_named_once(caplog):
    net = new_net()
    fit(Unused(net), admm(net, 2.0), epochs=2)
    found = [r.getMessage() for r in caplog.records if "does not reach" in r.getMessage()]
    assert found == ["the loss does not reach conv1, conv2, fc1: without a gradient ADMM cannot pull them"]


class TwoOptimizers(Users):
    automatic_optimization = False

    def configure_optimizers(self):
        return [sgd(self.backbone.conv1), sgd(self.backbone.fc1)]


def test_two_optimizers_need_a_rho_that_moves_the_weights():
    net = new_net()
    with pytest.raises(TrainingError, match="2 optimizers train the planned layers: use rho=auto"):
        fit(TwoOptimizers(net), admm(net, 1e-3))


def test_lbfgs_is_refused():
    net = new_net()
    with pytest.raises(TrainingError, match="LBFGS .*use SGD"):
        fit(Users(net, lambda module: torch.optim.LBFGS(module.parameters())), admm(net))


def test_weights_in_flat_pieces_are_refused():
    """As DeepSpeed and the first FSDP leave them, told by the names they give."""
    zero3, fsdp1 = new_net(), type("FullyShardedDataParallel", (Holder,), {})(inner=new_net())
    zero3.fc1.weight.ds_id = 1
    for net, owner in ((zero3, "DeepSpeed"), (fsdp1, "FullyShardedDataParallel")):
        with pytest.raises(TrainingError, match=rf"{owner}.* flat pieces, and ADMM finds no layers .*fully_shard"):
            Admm(net, plan_of(new_net()), sgd(net))
    optimizer = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero"})()
    with pytest.raises(TrainingError, match="DeepSpeedZeroOptimizer trains flat copies of the weights"):
        Admm(new_net(), plan_of(new_net()), optimizer)


def test_row_6_sharded_weights_and_scaled_gradients_are_refused():
    check_trainer("DDPStrategy", [sgd(new_net())], "16-mixed")
    with pytest.raises(
        TrainingError, match="FSDPStrategy splits weights into flat pieces.*fully_shard.*strategy='ddp'"
    ):
        check_trainer("FSDPStrategy", [sgd(new_net())], "32-true")
    fused = torch.optim.AdamW(new_net().parameters(), fused=True)
    check_trainer("SingleDeviceStrategy", [fused], "bf16-mixed")
    with pytest.raises(TrainingError, match="fused optimizer with precision=16-mixed .*fused=False"):
        check_trainer("SingleDeviceStrategy", [fused], "16-mixed")


def test_a_compiled_module_trains_as_the_plain_one():
    plain, compiled = new_net(), new_net()
    for net, module in ((plain, plain), (compiled, torch.compile(compiled, backend="eager"))):
        net.dropout.p = 0.0
        callback = AdmmCallback(plan_of(net), track_truncated=False)
        fit(Users(module), callback, epochs=2)
    torch.testing.assert_close(compiled.conv2.weight, plain.conv2.weight)
    assert callback.admm.primal


@pytest.mark.parametrize("planned", ["before", "after"])
def test_a_part_that_is_compiled_serves_whenever_the_plan_is_made(planned):
    net = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4))
    x, plain = torch.randn(2, 16), net[0]
    plans = [make_plan(net, 3, method="svd", include="0.*", example_input=x)]
    net[0] = torch.compile(plain, backend="eager")
    plans.append(make_plan(net, 3, method="svd", include="0.*", example_input=x))
    core = Admm(net, plans[planned == "after"], torch.optim.SGD(net.parameters(), lr=0.1), steps_per_epoch=1)
    net(x).sum().backward()
    core.before_step()
    core.optimizer.step()
    core.after_step()
    core.end_epoch()
    small = core.convert()
    assert len([m for m in small.modules() if isinstance(m, hodec.FactorizedLayer)]) == 1
    assert net[0]._orig_mod is plain
    torch.testing.assert_close(small(x), hodec.convert(nn.Sequential(plain, net[1]), plans[0])(x))


class Endless(torch.utils.data.IterableDataset):
    """Data of unknown length."""

    def __iter__(self):
        return iter(batches().dataset)


def test_data_of_unknown_length_needs_an_interval_in_steps():
    data = torch.utils.data.DataLoader(Endless(), batch_size=8)
    net = new_net()
    with pytest.raises(TrainingError, match="how many batches .*update_every='100steps'"):
        fit(Users(net), admm(net), data=data)
    callback = admm(net, update_every="3steps")
    fit(Users(net), callback, data=data, epochs=2)
    assert len(callback.admm.primal) == 2


def test_callback_serves_any_module_of_lightning():
    assert issubclass(AdmmCallback, pl.Callback)
