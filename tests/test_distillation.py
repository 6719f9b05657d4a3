"""FeatureDistillation: what it measures, what it leaves behind, what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hodec
from hodec.errors import ConfigError


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    """A factorized net and the dense one it is made from."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 6)
    )
    plan = hodec.make_plan(dense, 3, method="tucker", example_input=torch.randn(2, 3, 8, 8))
    return hodec.convert(dense, plan).train(), dense.eval()


def seen_by(module: nn.Module, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    outputs = []
    hook = module.register_forward_hook(lambda _, args, output: outputs.append(output))
    net(x)
    hook.remove()
    return outputs[0]


def test_it_is_the_mean_of_the_layers_relative_squared_distances(nets):
    small, dense = nets
    x = torch.randn(4, 3, 8, 8)
    features = hodec.FeatureDistillation(small, dense)
    assert features.layers == list(small.hodec_plan)
    dense(x)
    small(x)
    loss = features.loss()
    features.remove()
    wanted = []
    for name in features.layers:
        s, t = (seen_by(net.get_submodule(name), net, x) for net in (small, dense))
        wanted.append(float(((s - t).square().sum() / t.square().sum()).detach()))
    assert float(loss.detach()) == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)


def test_gradients_reach_the_student_alone(nets):
    small, dense = nets
    features = hodec.FeatureDistillation(small, dense)
    x = torch.randn(4, 3, 8, 8)
    dense(x)
    small(x)
    features.loss().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in small[0].parameters())
    assert all(p.grad is None for p in dense.parameters())


def test_the_same_net_is_at_no_distance(nets):
    _, dense = nets
    student = copy.deepcopy(dense).train()
    student[1].eval()
    features = hodec.FeatureDistillation(student, dense, ["0", "3", "5"])
    x = torch.randn(4, 3, 8, 8)
    dense(x)
    student(x)
    assert float(features.loss().detach()) == pytest.approx(0, abs=1e-10)


def test_validation_and_removed_hooks_leave_nothing_behind(nets):
    small, dense = nets
    features = hodec.FeatureDistillation(small, dense)
    x = torch.randn(4, 3, 8, 8)
    small.eval()(x)
    small.train()
    dense(x)
    small(x)
    features.loss()
    features.remove()
    dense(x)
    small(x)
    with pytest.raises(ConfigError, match="run both on the batch"):
        features.loss()
    assert not any(module._forward_hooks for net in nets for module in net.modules())


def test_a_test_of_the_teacher_and_layers_that_run_again_in_backward_leave_nothing_behind(nets):
    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    small, dense = map(Checkpointed, nets)
    features, x, losses = hodec.FeatureDistillation(small, dense), torch.randn(4, 3, 8, 8), []
    for _ in range(2):
        with torch.no_grad():
            dense(torch.randn(5, 3, 8, 8))
            dense(x)
        small(x)
        losses.append(features.loss())
        losses[-1].backward()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-4)


def test_what_cannot_be_compared_is_refused(nets):
    small, dense = nets
    with pytest.raises(ConfigError, match="student has no layer 'conv9'"):
        hodec.FeatureDistillation(small, dense, ["conv9"])
    with pytest.raises(ConfigError, match="no factorized layer"):
        hodec.FeatureDistillation(dense, dense)
    wider = nn.Sequential(nn.Conv2d(3, 9, 3), *[copy.deepcopy(one) for one in list(dense)[2:3]])
    features = hodec.FeatureDistillation(small, wider, ["0"])
    x = torch.randn(4, 3, 8, 8)
    wider(x)
    small(x)
    with pytest.raises(ConfigError, match="layer 0: outputs of"):
        features.loss()
