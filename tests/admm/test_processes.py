"""Several processes project their shares and hold one Z."""

import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hodec.admm import projection as projection_module
from hodec.admm.processes import Processes, partition
from hodec.admm.projection import Projection
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
            results[rank] = work(rank, self.process(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
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

    def spy(self, some):
        projected.setdefault(threading.get_ident(), []).extend(some)
        return real(self, some)

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
