"""Latency tables: what is measured, how it is kept, and the rules that spend it."""

import json
import math

import pytest
import torch
from torch import nn

from hodec.cost import latency
from hodec.cost.latency import LatencyTable, Machine, cache_folder
from hodec.cost.probe import GRID, Probe, moves, neighbours, probed_ops, probes_of
from hodec.errors import ConfigError
from hodec.formats.ops import Op
from hodec.methods import METHODS
from hodec.ranks import Budget, Greedy, Manual, make_plan
from hodec.ranks.greedy.stats import GreedyStats

from small_nets import SmallResNet, Tokens  # isort: skip

X = torch.randn(1, 6, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _counted(monkeypatch, tmp_path):
    """A time is the number of multiply-adds: exact, and the same on every machine."""
    monkeypatch.setenv("HODEC_CACHE", str(tmp_path / "cache"))

    def counted(works, **_):
        from torch.utils.flop_counter import FlopCounterMode

        found = {}
        for name, work in works.items():
            with FlopCounterMode(display=False) as counter:
                work()
            found[name] = counter.get_total_flops() / 2e6
        return found

    monkeypatch.setattr(latency, "medians_ms", counted)


def planned(net: nn.Module, x: torch.Tensor, ranks: object = 4, **settings: object):
    return make_plan(net, Manual(ranks), example_input=x, allow_larger=True, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_times_are_those_of_what_runs(method):
    """With multiply-adds for time, a table must find the plan's own counts: at ranks on the grid exactly."""
    plan, table = planned(SmallResNet(), X, 4, method=method, n_modes=1), LatencyTable()
    for name, layer in plan.items():
        assert table.before(layer) == pytest.approx(layer.macs_before / 1e6, rel=1e-6), name
        if all(rank in GRID for rank in layer.ranks):
            assert table.after(layer) == pytest.approx(layer.macs_after / 1e6, rel=1e-6), name


def test_a_batch_takes_its_multiple():
    plan = planned(SmallResNet(), X, n_modes=1)
    layer = plan["layer1.conv2"]
    one, three = LatencyTable(1), LatencyTable(3)
    assert three.before(layer) == pytest.approx(3 * one.before(layer))
    assert three.after(layer) == pytest.approx(3 * one.after(layer))


def test_between_grid_points_times_are_interpolated():
    layer = planned(SmallResNet(), X, {"layer1.conv2": [6, 6]}, method="tucker")["layer1.conv2"]
    table = LatencyTable()
    # 1x1 convolutions are linear in the rank; the middle one is a product of two that are
    assert table.after(layer) == pytest.approx(layer.macs_after / 1e6, rel=1e-6)
    assert table.measured == 2 + 4 + 2


def test_nets_of_three_dimensions_have_a_time():
    clip, net = torch.randn(1, 4, 3, 8, 8), nn.Sequential(nn.Conv3d(4, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 1))
    plan, table = planned(net, clip, 4, n_modes=1), LatencyTable()
    for layer in plan.values():
        assert table.before(layer) == pytest.approx(layer.macs_before / 1e6)
        assert table.after(layer) == pytest.approx(layer.macs_after / 1e6)
    assert table.net_ms(net, clip) == pytest.approx(plan.macs_before / 1e6)


def test_groups_have_a_time_of_their_own():
    """Equal in shape, ranks and calls, and of other multiply-adds."""
    net = nn.Sequential(nn.Conv2d(6, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1, groups=4))
    plan, table = planned(net, X, 4, n_modes=1), LatencyTable()
    for layer in plan.values():
        assert table.before(layer) == pytest.approx(layer.macs_before / 1e6)
        assert table.after(layer) == pytest.approx(layer.macs_after / 1e6)


def test_linear_layers_and_embeddings():
    tokens = torch.randn(2, 5, 16)
    plan, table = planned(Tokens(), tokens, 4, method="svd"), LatencyTable()
    for layer in plan.values():
        assert table.before(layer) == pytest.approx(layer.macs_before / 1e6)
        assert table.after(layer) == pytest.approx(layer.macs_after / 1e6)
    words = nn.Sequential(nn.Embedding(50, 16), nn.Flatten())
    layer = planned(words, torch.zeros(1, 3, dtype=torch.long), 2, method="svd")["0"]
    assert table.after(layer) > table.before(layer) == 0


def test_the_chain_is_measured_as_it_is():
    plan = planned(SmallResNet(), X, 2, n_modes=2, execution="chain")
    layer, table = plan["layer1.conv2"], LatencyTable()
    assert probed_ops(layer) == []
    assert table.after(layer) == pytest.approx(layer.macs_after / 1e6, rel=1e-6)
    assert table.measured == 1


# -- the file ------------------------------------------------------------------------------------------------------


def test_times_are_kept_for_the_next_table(tmp_path):
    layer = planned(SmallResNet(), X, n_modes=1)["conv1"]
    first = LatencyTable()
    ms = first.after(layer)
    assert first.measured > 0
    first.save()
    assert first.path.is_relative_to(tmp_path / "cache")
    again = LatencyTable()
    assert (again.after(layer), again.measured) == (ms, 0)
    value = json.loads(first.path.read_text())
    assert value["machine"] == {"device": Machine.this(torch.device("cpu")).device, "version": torch.__version__,
                                "threads": torch.get_num_threads()}  # fmt: skip


def test_a_table_that_is_given_up_is_written():
    table = LatencyTable()
    table.before(planned(SmallResNet(), X, n_modes=1)["conv1"])
    path = table.path
    del table
    assert path.exists()


def test_two_tables_add_up():
    plan = planned(SmallResNet(), X, n_modes=1)
    a, b = LatencyTable(), LatencyTable()
    a.before(plan["conv1"])
    b.before(plan["layer1.conv2"])
    a.save()
    b.save()
    assert len(json.loads(a.path.read_text())["ms"]) == 2


def test_another_machine_is_not_believed(monkeypatch):
    table = LatencyTable()
    layer = planned(SmallResNet(), X, n_modes=1)["conv1"]
    table.before(layer)
    table.save()
    value = json.loads(table.path.read_text())
    for change in ({"device": "another"}, {"threads": 99}, {"version": "0.1"}):
        other = {**value, "machine": {**value["machine"], **change}}
        table.path.write_text(json.dumps(other))
        fresh = LatencyTable()
        fresh.before(layer)
        assert fresh.measured == 1, change
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert LatencyTable().path != table.path


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"format": "hodec-latency", "version": 1}'])
def test_a_damaged_file_is_measured_anew(text, caplog):
    table = LatencyTable()
    table.path.parent.mkdir(parents=True, exist_ok=True)
    table.path.write_text(text)
    assert LatencyTable()._times == {}
    assert "is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = LatencyTable(folder=tmp_path / "file" / "below")
    table.before(planned(SmallResNet(), X, n_modes=1)["conv1"])
    table.save()
    assert "cannot be written" in caplog.text
    assert "HODEC_CACHE" in caplog.text


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("HODEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hodec"


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_a_wrong_batch_is_named(batch):
    with pytest.raises(ConfigError, match=r"batch=.* is not a whole number of at least 1"):
        LatencyTable(batch)


# -- probes --------------------------------------------------------------------------------------------------------


def test_neighbours_share_a_point():
    assert neighbours(16) == [(1.0, 16)]
    assert neighbours(20) == [(0.75, 16), (0.25, 32)]
    assert neighbours(10**6) == [(1.0, 10**6)]
    for n in range(1, 600):
        assert sum(part * grid for part, grid in neighbours(n)) == pytest.approx(n)


SETTINGS = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": 3, "padding": 2},
    {"stride": 2, "padding": 3, "kernel_size": 7},
    {"kernel_size": 1, "stride": 2},
    {"padding": 2, "dilation": 2},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [7, 14, 32])
def test_a_convolution_of_the_same_sizes_is_found(settings, size):
    for cls, transposed in ((nn.Conv2d, False), (nn.ConvTranspose2d, True)):
        settings = {"kernel_size": 3, **settings}
        dense = cls(2, 2, **settings)
        x = torch.randn(1, 2, size, size)
        after = tuple(dense(x).shape[2:])
        found = moves([settings["kernel_size"]] * 2, (size, size), after, transposed=transposed)
        again = cls(2, 2, settings["kernel_size"], **found)
        assert tuple(again(x).shape[2:]) == after


def test_a_probe_builds_what_its_key_says():
    probe = Probe("conv2d", Op((8, 4, 3, 3), (0, 1)), (10, 10), (5, 5))
    made = probe.build()(probe.example(2))
    assert made.shape == (2, 8, 5, 5)
    assert probe.key == "conv2d 8x4x3x3 at 10x10 -> 5x5"


def test_a_layer_that_runs_twice_counts_twice():
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x)[:, :, ::2, ::2])

    layer = planned(Again(), X, 4, n_modes=1)["conv"]
    assert sum(times for times, _ in probes_of(layer, dense=True)) == 2
    assert LatencyTable().before(layer) == pytest.approx(layer.macs_before / 1e6)


# -- the rules -----------------------------------------------------------------------------------------------------


def test_the_rest_is_what_is_left_of_the_whole_net():
    net, table = SmallResNet(), LatencyTable()
    plan = planned(net, X, n_modes=1, exclude=["conv1"])
    whole = table.net_ms(net, X)
    assert net.training
    assert table.rest_ms(net, X, plan.values()) == pytest.approx(
        whole - sum(p.macs_before for p in plan.values()) / 1e6
    )
    assert table.rest_ms(net, X, [*plan.values()] * 9) == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_net_that_was_trained_under_a_weight_norm_has_a_time():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16)))
    net(torch.randn(2, 16)).sum().backward()
    assert LatencyTable().net_ms(net, torch.randn(2, 16)) > 0


def test_budget_spends_milliseconds():
    net, table = SmallResNet().eval(), LatencyTable()
    whole = table.net_ms(net, X)
    plan = make_plan(net, Budget(latency_ms=0.5 * whole, latency_table=table), n_modes=1, example_input=X)
    spent = table.rest_ms(net, X, plan.values()) + sum(table.after(layer) for layer in plan.values())
    assert 0.4 * whole < spent <= 0.5 * whole * (1 + 1e-6)
    assert math.isclose(spent, plan.macs_after / 1e6, rel_tol=0.1)


def test_greedy_spends_milliseconds():
    net, table = SmallResNet().eval(), LatencyTable()
    found: list[GreedyStats] = []
    rule = Greedy(lambda _: 1.0, 0.6, "latency_ms", 4, latency_table=table, progress=False, report=found.append)
    plan = make_plan(net, rule, n_modes=1, example_input=X)
    assert found[0].ratio <= 0.6
    assert len(plan) > 0


@pytest.mark.parametrize("rule", [Budget(latency_ms=0.2), Greedy(lambda _: 1.0, 0.6, "latency_ms", 4, progress=False)])
def test_without_a_table_milliseconds_are_measured_once_a_plan(monkeypatch, rule):
    tables = []
    monkeypatch.setattr(latency, "LatencyTable", lambda: tables.append(LatencyTable()) or tables[-1])
    assert make_plan(SmallResNet().eval(), rule, n_modes=1, example_input=X)
    assert [table.measured > 0 for table in tables] == [True]
    make_plan(SmallResNet().eval(), Budget(0.5, tolerance=0.2), n_modes=1, example_input=X)
    assert len(tables) == 1


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_one_message(device):
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used") as error:
        LatencyTable(device=device)
    assert "\n" not in str(error.value)
