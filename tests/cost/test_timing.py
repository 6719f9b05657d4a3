"""Medians of interleaved work; nothing here goes by how fast the machine is."""

import torch

from hodec.cost.timing import device_name, medians_ms


def test_every_work_is_measured_in_turn():
    calls: list[str] = []
    found = medians_ms({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, rounds=(3, 9))
    assert set(found) == {"a", "b"}
    assert all(ms >= 0 for ms in found.values())
    assert min(calls.count("a"), calls.count("b")) >= 3


def test_rounds_end_with_the_most_that_is_allowed():
    count = [0]

    def work():
        count[0] += 1
        torch.randn(200, 200) @ torch.randn(200, 200)

    medians_ms({"": work}, seconds=60.0, rounds=(1, 2))
    assert 4 <= count[0] < 10_000


def test_nothing_to_measure():
    assert medians_ms({}) == {}


def test_the_device_says_its_threads():
    assert device_name().endswith(f"{torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() != 1))
