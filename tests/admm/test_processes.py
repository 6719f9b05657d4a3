"""Several processes project their shares and hold one Z."""

import threading

import pytest
import torch
from admm_fits import new_net, plan_of, samples, sgd
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from hodec.admm import projection as projection_module
from hodec.admm.core import Admm
from hodec.admm.processes import Processes, partition
from hodec.admm.projection import Projection
from hodec.admm.updates import AdmmState
from hodec.errors import HodecError, TrainingError
from hodec.models import build_model
from hodec.plan.plan import Plan
from hodec.ranks import Manual, make_plan


class Room:
    """Threads that stand for processes: each waits until the source has spoken."""

    def __init__(self, count: int) -> None:
        self.count, self.said, self.barrier = count, None, threading.Barrier(count)

    def process(self, rank: int) -> Processes:
        def broadcast(value, source):
            if rank == source:
                self.said = value
            self.barrier.wait(10)
            said = self.said
            self.barrier.wait(10)
            return said

        return Processes(rank, self.count, broadcast)

    def run(self, work) -> list:
        results: list = [None] * self.count

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank, self.process(rank))
            except HodecError as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for error in results:
            if isinstance(error, HodecError):
                raise error
        return results


@pytest.fixture
def planned() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    net = build_model("resnet20", in_channels=3, num_classes=10)
    return net, make_plan(net, Manual(4), example_input=torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_parts_are_even_complete_and_the_same_everywhere(count: int, planned: tuple[nn.Module, Plan]):
    _, plan = planned
    divided = partition(plan, list(plan), count)
    assert len(divided) == count
    assert sorted(name for names in divided for name in names) == sorted(plan)
    assert divided == partition(plan, list(reversed(list(plan))), count)
    if count <= 3:
        work = [sum(plan[name].params_before * plan[name].shape[0] for name in names) for names in divided]
        assert max(work) <= 1.3 * min(work)


@pytest.mark.parametrize("distribute", [True, False])
@pytest.mark.parametrize("method", ["tt", "cp"])
def test_each_projects_its_share_and_all_hold_the_same(
    method: str, distribute: bool, planned: tuple[nn.Module, Plan], monkeypatch: pytest.MonkeyPatch
):
    net, _ = planned
    plan = make_plan(net, Manual(4), method=method, example_input=torch.zeros(1, 3, 8, 8), include=["layer1.*"])
    tensors = {name: net.get_submodule(name).weight.detach() for name in plan}
    projected: dict[int, list[str]] = {}
    real = Projection._project

    def spy(self, some, plan):
        projected.setdefault(threading.get_ident(), []).extend(some)
        return real(self, some, plan)

    monkeypatch.setattr(Projection, "_project", spy)
    alone = Projection(plan).update(tensors, {}, Processes())
    projected.clear()
    many = [Projection(plan, distribute=distribute) for _ in range(2)]
    first, second = Room(2).run(lambda rank, process: many[rank].update(tensors, {}, process))
    assert_close(first, second, rtol=0, atol=0)
    assert_close(many[0].factors, many[1].factors, rtol=0, atol=0)
    assert list(first) == list(tensors)
    assert_close(first, alone, rtol=1e-4, atol=1e-5)
    assert bool(many[0].factors) == (method == "cp")
    if distribute:
        one, other = projected.values()
        assert one
        assert other
        assert sorted(one + other) == sorted(plan)


def test_ranks_are_those_of_the_first(planned: tuple[nn.Module, Plan]):
    net, plan = planned
    tensors = {name: net.get_submodule(name).weight.detach() for name in plan}

    class Learner:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def update(self, plan, weights, rho):
            return projection_module.with_ranks(plan, {"layer1.0.conv1": [1 + self.rank] * 4})

    many = [Projection(plan, Learner(rank)) for rank in range(3)]
    Room(3).run(lambda rank, process: many[rank].update(tensors, {}, process))
    assert {projection.plan["layer1.0.conv1"].ranks for projection in many} == {(1, 1, 1, 1)}


# -- what processes hold is compared ---------------------------------------------------------------------------


def trained_together(harm, *, epochs: int = 3) -> list[Admm]:
    """Two replicas under ADMM, whose gradients are equal; ``harm`` is done to the second within epoch 1."""
    data = TensorDataset(*samples())
    nets = [new_net().eval() for _ in range(2)]  # no dropout; here, for threads share one generator

    def work(rank: int, process: Processes) -> Admm:
        net = nets[rank]
        optimizer = sgd(net)
        admm = Admm(net, plan_of(net), optimizer, steps_per_epoch=4, processes=process, update_every="4steps")
        for epoch in range(epochs):
            for step, (x, y) in enumerate(DataLoader(data, batch_size=8)):
                if (epoch, step, rank) == (1, 2, 1):
                    harm(admm)
                optimizer.zero_grad()
                cross_entropy(net(x), y).backward()
                admm.before_step()
                optimizer.step()
                admm.after_step()
            admm.end_epoch()
        return admm

    return Room(2).run(work)


def shifted_u(admm: Admm) -> None:
    """U of one layer off by 0.1, as a fault of the memory or a wrong restart would leave it."""
    state = admm.states["conv2"]
    admm.states["conv2"] = AdmmState(state.z, state.u + 0.1, state.rho)
    admm._targets["conv2"] = state.z - state.u - 0.1


def shifted_weight(admm: Admm) -> None:
    admm.weights["fc1"].data += 0.1


def rounded_weight(admm: Admm) -> None:
    """As another kind of device would round."""
    admm.weights["fc1"].data[0, 0] *= 1 + 2**-23


@pytest.mark.parametrize(("harm", "layer"), [(shifted_u, "conv2"), (shifted_weight, "fc1")])
def test_row_34_replicas_that_drift_apart_are_stopped(harm, layer: str):
    with pytest.raises(TrainingError, match=rf"epoch 1, step 8: the weights of 3 layers differ .* {layer}: process 1"):
        trained_together(harm)


def test_row_34_rounding_of_other_devices_is_mended():
    one, other = trained_together(rounded_weight)
    for name, w in one.weights.items():
        assert torch.equal(w, other.weights[name])
        assert torch.equal(one.states[name].u, other.states[name].u)
    assert one.primal == other.primal


def test_row_34_another_dual_is_mended(caplog: pytest.LogCaptureFixture):
    """Planted where no step is taken on it: what both processes hold is that of the first again."""
    nets = [new_net() for _ in range(2)]

    def work(rank: int, process: Processes) -> Admm:
        net = nets[rank]
        admm = Admm(net, plan_of(net), sgd(net), steps_per_epoch=4, processes=process)
        admm.start()
        if rank:
            shifted_u(admm)
        admm.steps = 1
        admm._compare()
        return admm

    one, other = Room(2).run(work)
    assert torch.equal(one.states["conv2"].u, other.states["conv2"].u)
    assert torch.equal(other._targets["conv2"], one._targets["conv2"])
    assert "Z, U or rho of {'conv2': [1]} differ between the processes" in caplog.text
