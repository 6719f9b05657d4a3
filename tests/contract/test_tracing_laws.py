"""Laws of every factorized layer under torch's tracers: the graph gives its outputs, and follows its weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from cases import Case, every_execution, relative
from torch import Tensor, nn


def _jit(net: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.trace(net, x, check_trace=False)


def _export(net: nn.Module, x: Tensor) -> nn.Module:
    return torch.export.export(net, (x,)).module()


TRACERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "fx": lambda net, x: torch.fx.symbolic_trace(net),
    "jit": _jit,
    "export": _export,
}


@every_execution
@pytest.mark.parametrize(
    "tracer", [pytest.param(name, marks=[pytest.mark.slow] if name == "export" else []) for name in TRACERS]
)
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_traced_net_gives_the_outputs_and_follows_its_weights(case: Case, execution: str, tracer: str):
    net, x = nn.Sequential(case.layer(case.dense(), execution=execution)).eval(), case.input()
    with torch.no_grad():
        before = net(x)  # what inference remembers must not go into the graph
        traced = TRACERS[tracer](copy.deepcopy(net), x)
        torch.testing.assert_close(traced(x), before, rtol=1e-9, atol=1e-9)
        for p in [*traced.parameters(), *net.parameters()]:
            p.mul_(1.5)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-9, atol=1e-9)
        assert relative(traced(x), before) > 0.1


@every_execution
def test_fx_sees_one_node_a_layer(case: Case, execution: str):
    traced = torch.fx.symbolic_trace(nn.Sequential(case.layer(case.dense(), execution=execution)))
    assert [(node.op, node.target) for node in traced.graph.nodes][1:-1] == [("call_module", "0")]
