"""The sensitivity curve of a layer: the largest ranks within even shares of its cost, counted as the layer runs."""

from dataclasses import replace

import pytest
import torch
from rank_cases import context

from hodec.cost.metric import METRICS
from hodec.formats.calls import CallSites
from hodec.ranks import LayerContext
from hodec.ranks.greedy.curves import curve_of
from hodec.ranks.ratio import ranks_for_ratio


def strided(kernel: int) -> LayerContext:
    """A convolution 256 -> 512 with stride 2, whose 1x1 part runs at four times the positions of the rest."""
    one = context(torch.empty(512, 256, kernel, kernel), "weight_svd")
    return replace(one, site=replace(one.site, call_sites=CallSites.once((8, 8), (4, 4))))


@pytest.mark.parametrize(("kernel", "count", "share", "rank"), [(3, 18, 11 / 18, 128), (1, 4, 0.75, 64)])
def test_defect_a_split_layers_cost_what_they_cost_at_the_resolution_they_run_at(
    kernel: int, count: int, share: float, rank: int
):
    curve = curve_of(strided(kernel), METRICS["macs"], ratios=count, multiplicity=1)
    ratios = {layer.ranks: METRICS["macs"].ratio(layer) for layer in curve.measured}
    assert ratios[rank,] == pytest.approx(share, abs=1e-12)


def test_ranks_that_save_parameters_but_cost_more_macs_are_not_offered():
    """They would be left dense afterwards, and the target be missed."""
    curve = curve_of(strided(1), METRICS["params"], ratios=10, multiplicity=1)
    ranks = [layer.ranks[0] for layer in curve.measured]
    assert ranks == [17, 34, 51, 68, 85]  # from 86 on more than 512 * 256 MACs an output position


@pytest.mark.parametrize("method", ["svd", "weight_svd", "spatial_svd", "tucker", "tt"])
def test_measured_ranks_are_the_largest_ranks_within_even_shares(method: str):
    one = context(torch.empty(24, 16, 3, 3), method)
    for metric in METRICS.values():
        curve = curve_of(one, metric, ratios=10, multiplicity=1)
        assert curve.offered == curve.measured
        assert 5 <= len(curve.measured) <= 9
        assert {layer.ranks for layer in curve.measured} <= {ranks_for_ratio(one, i / 10, metric) for i in range(1, 10)}
        ratios = [metric.ratio(layer) for layer in curve.measured]
        assert ratios == sorted(ratios)
        assert all(layer.saves() for layer in curve.measured)


def test_multiplicity_rounds_up_caps_at_full_and_drops_what_no_longer_saves():
    one = context(torch.empty(30, 20), "svd")  # 50 numbers a rank of 600: rank 12 is dense
    curve = curve_of(one, METRICS["params"], ratios=10, multiplicity=4)
    assert [layer.ranks for layer in curve.measured] == [(r,) for r in (1, 2, 3, 4, 6, 7, 8, 9, 10)]
    assert [layer.ranks for layer in curve.offered] == [(4,), (8,)]
    assert curve.offered[0].notes == ("ranks [1] became [4]: multiplicity=4",)
    assert curve_of(one, METRICS["params"], ratios=10, multiplicity=32).offered == ()
