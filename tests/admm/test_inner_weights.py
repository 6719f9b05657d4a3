"""ADMM on weights inside modules with several: bound by their own paths, projected, and converted."""

import pytest
import torch
from swaps import planned
from torch import Tensor, nn

import hodec


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(x)[0]
        return self.head(self.attention(x, x, x)[0])


class Holder(nn.Module):
    """The net hangs in another module, as in a LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize("method", ["svd", "tt"])
def test_a_run_ends_at_the_planned_ranks(method: str):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(16, 5, 8)
    plan = planned(net, 2, x, method=method, include=["rnn.*", "attention.*"])
    names = {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert set(plan) == names
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.5)
    admm = hodec.Admm(Holder(net), plan, optimizer, steps_per_epoch=10)
    admm.start()
    for name, layer in plan.items():
        assert admm.weights[name] is net.get_parameter(name)
        torch.testing.assert_close(admm.states[name].z, layer.project(net.get_parameter(name).detach()))
    reports = []
    for _ in range(6):
        for _ in range(10):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            admm.before_step()
            optimizer.step()
            admm.after_step()
        reports.append(admm.end_epoch())
    assert reports[-1]["primal_residual"] < 0.05 < 0.3 < reports[0]["truncation_error"] + reports[0]["primal_residual"]
    small = admm.convert().eval()
    torch.testing.assert_close(small(x), net.eval()(x), rtol=0.1, atol=0.02)
    other = hodec.Admm(net, plan, optimizer, steps_per_epoch=10)
    other.load_state_dict(admm.state_dict())
    assert other.states.keys() == names
