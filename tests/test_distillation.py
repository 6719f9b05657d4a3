"""FeatureDistillation: what it measures, what it leaves behind, what it refuses."""

import copy
import pickle

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


class InPlace(nn.Module):
    """A net whose activations write over what its layers gave, or do not."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.second(self.act(self.first(x))))


def losses(*, inplace: bool, passes: int) -> list[float]:
    dense = InPlace(inplace=inplace)
    plan = hodec.make_plan(dense, 3, method="tucker", example_input=torch.randn(2, 3, 8, 8))
    small = hodec.convert(dense, plan)
    features, found = hodec.FeatureDistillation(small, dense.eval()), []
    for seed in range(passes):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            dense(x)
        small(x)
        found.append(float(features.loss().detach()))
    return found


def test_what_a_layer_gave_is_compared_whatever_writes_over_it():
    assert losses(inplace=True, passes=3) == pytest.approx(losses(inplace=False, passes=3), rel=1e-6)


def test_an_output_that_is_written_over_from_now_on_is_told_of():
    dense = InPlace(inplace=False)
    plan = hodec.make_plan(dense, 3, method="tucker", example_input=torch.randn(2, 3, 8, 8))
    small, x = hodec.convert(dense, plan), torch.randn(4, 3, 8, 8)
    features = hodec.FeatureDistillation(small, dense)
    dense(x), small(x)
    features.loss()
    small.act.inplace = True
    dense(x), small(x)
    with pytest.raises(ConfigError, match="layer first: what follows writes over its output now"):
        features.loss()


def test_passes_without_copies_compare_the_same(nets):
    small, dense = nets
    features, x, found = hodec.FeatureDistillation(small, dense), torch.randn(4, 3, 8, 8), []
    small[1].eval()
    for _ in range(3):
        dense(x), small(x)
        found.append(features.loss())
        found[-1].backward()
    assert len({float(one.detach()) for one in found}) == 1


def test_a_teacher_in_inference_mode_teaches(nets):
    small, dense = nets
    features, x = hodec.FeatureDistillation(small, dense), torch.randn(4, 3, 8, 8)
    for _ in range(2):
        with torch.inference_mode():
            dense(x)
        small(x)
        features.loss().backward()
    assert all(p.grad is not None for p in small[0].parameters())


def test_copies_and_files_of_a_student_take_no_part(nets):
    small, dense = nets
    features, x = hodec.FeatureDistillation(small, dense), torch.randn(4, 3, 8, 8)
    dense(x), small(x)
    copies = [copy.deepcopy(small), torch.optim.swa_utils.AveragedModel(small), copy.deepcopy(dense)]
    copies.append(pickle.loads(pickle.dumps(small)))
    for one in copies:
        one(x)
    assert 0 < float(features.loss().detach()) < 1
    features.remove()
    for one in copies:
        one(x)
    assert not any(seen.kept or seen.given for seen in features._seen)
    torch.testing.assert_close(copies[-1](x), small(x))


def test_a_student_in_evaluation_mode_learns_as_well(nets):
    small, dense = nets
    features, x = hodec.FeatureDistillation(small.eval(), dense), torch.randn(4, 3, 8, 8)
    dense(x), small(x)
    features.loss().backward()
    assert all(p.grad is not None for p in small[0].parameters())
    with torch.no_grad():
        dense(x), small(x)
    with pytest.raises(ConfigError, match="run both on the batch"):
        features.loss()


def test_wrapped_nets_are_looked_into(nets):
    small, dense = nets
    x = torch.randn(4, 3, 8, 8)
    wanted = hodec.FeatureDistillation(small, dense)
    dense(x), small.eval()(x)
    loss = float(wanted.loss().detach())
    wanted.remove()
    compiled = torch.compile(small, backend="eager")
    features = hodec.FeatureDistillation(compiled, nn.DataParallel(dense))
    assert features.layers == list(small.hodec_plan)
    for _ in range(2):
        dense(x), compiled(x)
        assert float(features.loss().detach()) == pytest.approx(loss, rel=1e-4)


def test_one_name_is_one_layer_and_no_tensor_is_refused(nets):
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": x}

    small, dense = nets
    assert hodec.FeatureDistillation(small, dense, "0").layers == ["0"]
    student, teacher = nn.Sequential(Pair()), nn.Sequential(Pair())
    hodec.FeatureDistillation(student, teacher, ["0"])
    with pytest.raises(ConfigError, match="layer 0: its output is a dict; compared are tensors"):
        student(torch.zeros(1))


def test_the_first_pass_has_the_gradients_of_the_others(nets):
    """Otherwise a run that goes on from a checkpoint would not be the run that was not stopped."""
    small, dense = nets
    features, x, found = hodec.FeatureDistillation(small.eval(), dense), torch.randn(4, 3, 8, 8), []
    for _ in range(3):
        with torch.no_grad():
            dense(x)
        scores = small(x)  # of the last factorized layer, with several uses, whose gradients are summed in order
        small.zero_grad()
        (scores.square().mean() + scores.sin().mean() + scores.exp().mean() + features.loss()).backward()
        found.append([p.grad.clone() for p in small.parameters()])
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))
