"""Recurrent modules with factorized weights: at full rank they are torch's own, whichever way they run."""

import copy
import pickle

import pytest
import torch
from swaps import planned
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import hodec
from hodec.cost.probe import probes_of
from hodec.errors import PlanError
from hodec.formats.roles import REBUILT
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

MODES = [("svd", "merged"), ("tt", "chain"), ("svd", REBUILT), ("tt", REBUILT)]
every_way = pytest.mark.parametrize(("method", "execution"), MODES)
SETTINGS = [
    (nn.LSTM, {"batch_first": True}),
    (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
    (nn.LSTM, {"proj_size": 4, "bidirectional": True}),
    (nn.GRU, {"batch_first": True, "bidirectional": True, "num_layers": 2, "bias": False}),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.RNN, {"bidirectional": True}),
]


class Reads(nn.Module):
    """A net around a recurrent module; it takes what that takes."""

    def __init__(self, cls: type[nn.Module], **settings: object) -> None:
        super().__init__()
        self.rnn = cls(6, 8, **settings).double()

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        given = state if isinstance(self.rnn, nn.LSTM) else state[0] if state else None
        output, after = self.rnn(x, given or None) if isinstance(given, tuple) else self.rnn(x, given)
        parts = after if isinstance(after, tuple) else (after,)
        return torch.cat([output.flatten(), *(part.flatten() for part in parts)])


def full(net: nn.Module, x: object, method: str, execution: str) -> Plan:
    return planned(net, 10**6, x, method=method, execution=execution, allow_larger=True)


@every_way
@pytest.mark.parametrize(("cls", "settings"), SETTINGS)
def test_at_full_rank_outputs_and_states_are_torchs(cls: type[nn.Module], settings: dict, method: str, execution: str):
    net, x = Reads(cls, **settings), torch.randn(3, 5, 6).double()
    plan = full(net, x, method, execution)
    assert set(plan) == {f"rnn.{name}" for name in net.rnn._flat_weights_names if name.startswith("weight")}
    assert {layer.resolved_execution for layer in plan.values()} == {execution}
    small = hodec.convert(net, plan)
    rows, batch = net.rnn.num_layers * (1 + net.rnn.bidirectional), 3 if net.rnn.batch_first else 5
    h = torch.randn(rows, batch, net.rnn.proj_size or 8).double()
    state = (h, torch.randn(rows, batch, 8).double()) if cls is nn.LSTM else (h,)
    for training in (True, False):
        net.train(training), small.train(training)
        for given in ((x,), (x, *state), (x[0],), (x[0], *(part[:, 0] for part in state))):
            torch.testing.assert_close(small(*given), net(*given), rtol=1e-9, atol=1e-9)


@every_way
def test_below_full_rank_training_and_inference_agree_and_every_factor_learns(method: str, execution: str):
    net, x = Reads(nn.LSTM, bidirectional=True), torch.randn(4, 3, 6).double()
    small = hodec.convert(net, planned(net, 2, x, method=method, execution=execution, allow_larger=True))
    outputs, gradients = [], []
    for training in (True, False):
        small.train(training).zero_grad()
        outputs.append(small(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in small.parameters()])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(float(g.norm()) > 0 for g in gradients[0])
    assert not torch.allclose(outputs[0], net(x))


@every_way
def test_packed_sequences_go_through_torchs_kernel(method: str, execution: str):
    net, x = Reads(nn.GRU, batch_first=True), torch.randn(2, 5, 6).double()
    small = hodec.convert(net, full(net, x, method, execution)).eval()
    packed = pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
    mine, theirs = (pad_packed_sequence(m.rnn(packed)[0])[0] for m in (small, net))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@every_way
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "file"])
def test_copies_answer_the_same(method: str, execution: str, way: str, tmp_path):
    net, x = Reads(nn.LSTM), torch.randn(4, 3, 6).double()
    small = hodec.convert(net, planned(net, 2, x, method=method, execution=execution, allow_larger=True)).eval()
    with torch.no_grad():
        expected = small(x)
        if way == "file":
            hodec.save(small, tmp_path / "small.safetensors")
            other = hodec.load(tmp_path / "small.safetensors", Reads(nn.LSTM)).eval()
        elif way == "state_dict":
            other = hodec.convert(net, small.hodec_plan, decompose=False).eval()
            other.load_state_dict(small.state_dict())
        else:
            other = copy.deepcopy(small) if way == "deepcopy" else pickle.loads(pickle.dumps(small))
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        for p in other.parameters():
            p.add_(1)
        torch.testing.assert_close(small(x), expected, rtol=0, atol=0)
        assert not torch.allclose(other(x), expected)


def test_a_converted_module_is_still_what_it_was():
    net, x = Reads(nn.LSTM), torch.randn(4, 3, 6).double()
    plan = planned(net, 2, x, method="svd")
    small = hodec.convert(net, plan)
    assert isinstance(small.rnn, nn.LSTM)
    assert small.rnn.weight_hh_l0.shape == (32, 8)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after
    errors = hodec.conversion_errors(net, plan, small)
    for name, layer in plan.items():
        weight = net.get_parameter(name).detach()
        near = getattr(small.rnn, name.removeprefix("rnn.")).detach()
        torch.testing.assert_close(near, layer.project(weight))
        assert errors[name] == pytest.approx(float((weight - near).norm() / weight.norm()), rel=1e-5)
    half = copy.deepcopy(small).float().eval()
    assert half(x.float()).dtype == torch.float32


def test_a_weight_is_multiplied_at_each_step_and_runs_by_its_factors_where_these_save_enough():
    def layer(size: int, **settings: object) -> LayerPlan:
        net, x = nn.Sequential(nn.LSTM(size, size)), torch.randn(7, 1, size)
        return planned(net, 2, x, method="svd", include=["*weight_hh*"], **settings)["0.weight_hh_l0"]

    small, large = layer(16), layer(512)
    assert small.call_sites.out_positions == 1  # the first axis, the steps here, counts as the batch
    assert (small.resolved_execution, small.macs_after) == (REBUILT, small.macs_before)
    assert (large.resolved_execution, large.macs_after) == ("merged", 2 * 5 * 512)
    assert layer(16, execution="merged").resolved_execution == "merged"
    with pytest.raises(PlanError, match="execution 'chain' is not one of auto, rebuilt, merged"):
        layer(16, execution="chain")


def test_a_plan_file_says_what_uses_a_weight(tmp_path):
    net, x = Reads(nn.LSTM), torch.randn(4, 3, 6).double()
    plan = planned(net, 2, x, method="svd")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.to_dict()["layers"]["rnn.weight_ih_l0"]["role"] == "recurrent"
    with pytest.raises(PlanError, match=r"the plan names the weight rnn.weight_ih_l0, which this model lacks"):
        hodec.convert(nn.Sequential(nn.Linear(6, 8)), plan)
    with pytest.raises(PlanError, match=r"the plan is for a linear weight \(32, 6\), this model has \(24, 6\)"):
        hodec.convert(Reads(nn.GRU), plan)


def test_weights_that_cannot_be_factorized_say_why():
    net, x = Reads(nn.LSTM, num_layers=2), torch.randn(4, 3, 6).double()
    net.rnn.weight_hh_l1 = net.rnn.weight_hh_l0
    net.idle = nn.GRU(6, 8).double()
    plan = planned(net, 2, x, method="svd")
    assert list(plan) == ["rnn.weight_ih_l0", "rnn.weight_ih_l1"]
    assert plan.skipped == {
        "rnn.weight_hh_l0": "it is shared with rnn.weight_hh_l1",
        "rnn.weight_hh_l1": "it is shared with rnn.weight_hh_l0",
        **dict.fromkeys(
            ("idle.weight_ih_l0", "idle.weight_hh_l0"),
            "the module that holds it is never called by the forward pass with this input",
        ),
    }
    reasons = planned(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(2), Reads(nn.LSTM, batch_first=True)).double(), 2,
                      torch.randn(1, 8, 4, 5).double(), method="tt_classical", allow_larger=True).skipped  # fmt: skip
    assert reasons["2.rnn.weight_hh_l0"] == "method tt_classical has no layer for Linear"


@pytest.mark.parametrize(("execution", "cls"), [(REBUILT, nn.LSTM), ("merged", None)])
def test_fusing_gives_torchs_module_where_the_weights_are_rebuilt(execution: str, cls: type[nn.Module] | None):
    net, x = Reads(nn.LSTM, batch_first=True).float(), torch.randn(3, 5, 6)
    plan = planned(net, 2, x, method="svd", execution=execution, allow_larger=True)
    small = hodec.convert(net, plan).eval()
    fused = hodec.fuse(small, example_input=x, target="macs")
    assert cls is None or (type(fused.rnn) is cls and not any("factorized" in key for key in fused.state_dict()))
    assert type(small.rnn) is not nn.LSTM
    with torch.no_grad():
        torch.testing.assert_close(fused(x), small(x))
    macs = {name.rpartition(".")[2]: choice.macs["merged"] for name, choice in fused.fuse_report.layers.items()}
    assert macs == ({} if cls else {name.removeprefix("rnn."): layer.macs_after for name, layer in plan.items()})


def test_steps_have_no_time_in_the_latency_table():
    net, x = Reads(nn.LSTM, batch_first=True), torch.randn(3, 5, 6).double()
    layers = planned(net, 2, x, method="svd", allow_larger=True, execution="merged")
    with pytest.raises(PlanError, match=r"runs by its factors, step by step, has no latency by the table"):
        probes_of(layers["rnn.weight_hh_l0"], dense=False)
    ((_, probe),) = probes_of(planned(net, 2, x, method="svd")["rnn.weight_hh_l0"], dense=False)
    assert (probe.op.kernel, probe.in_size) == ((32, 8), (5,))
