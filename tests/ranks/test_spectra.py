"""Singular values read as what each rank loses, and the path of sensible ranks."""

import pytest
import torch
from rank_cases import CONV_METHODS, candidate, conv_weight, with_singular_values

from hodec.ranks.spectra import path, ranks_for_tail, relative_error, spectra

VALUES = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)  # squares 16, 9, 4, 1 of 30
MATRIX = candidate(with_singular_values(VALUES, 4, 9))


def test_a_spectrum_holds_shares_of_the_squared_norm_and_what_each_rank_loses():
    (one,) = spectra(MATRIX)
    assert one.position == 0
    torch.testing.assert_close(one.energy, VALUES.square() / 30)
    torch.testing.assert_close(one.tails, torch.tensor([30.0, 14, 5, 1, 0], dtype=torch.float64) / 30)


@pytest.mark.parametrize(("share", "rank"), [(0, 4), (0.03, 4), (0.04, 3), (0.17, 2), (0.5, 1), (1, 1)])
def test_the_least_rank_that_loses_no_more_than_a_share(share: float, rank: int):
    (one,) = spectra(MATRIX)
    assert one.rank_for_tail(share) == rank
    assert ranks_for_tail(MATRIX, [one], share) == (rank,)


def test_a_zero_weight_has_rank_1_and_no_error():
    zero = candidate(torch.zeros(4, 9))
    (one,) = spectra(zero)
    assert one.rank_for_tail(0) == 1
    assert relative_error([one], [1]) == 0
    assert [option.layer.ranks for option in path(zero)] == [(1,)]


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_shares_do_not_depend_on_the_scale(scale: float):
    (one,), (other,) = spectra(MATRIX), spectra(candidate(MATRIX.site.weight * scale))
    torch.testing.assert_close(one.energy, other.energy)


@pytest.mark.parametrize("method", CONV_METHODS)
def test_the_relative_error_bounds_the_error_of_the_projection(method: str):
    one = candidate(conv_weight().double(), method)
    found = spectra(one)
    assert {spectrum.position for spectrum in found} == set(range(len(one.most)))
    weight = one.site.weight
    for share in (0.0, 0.1, 0.4, 0.9):
        ranks = ranks_for_tail(one, found, share)
        real = float((weight - one.format.project(weight, ranks, one.modes)).norm() / weight.norm())
        bound = relative_error(found, ranks)
        assert real <= bound + 1e-6
        if len(found) == 1 and not one.format.iterative:
            assert real == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize("method", CONV_METHODS)
def test_the_path_goes_from_least_to_full_ranks_with_cost_rising(method: str):
    one = candidate(conv_weight(), method)
    options = path(one)
    least = one.format.fit_ranks(one.site.shape, one.modes, [1] * len(one.most))
    everything = {option.layer.ranks for option in options}
    assert least in everything
    assert one.most in everything
    assert len(everything) == len(options)
    costs = [option.layer.macs_after for option in options]
    assert costs == sorted(costs)
    full = next(option for option in options if option.layer.ranks == one.most)
    assert full.error == pytest.approx(0, abs=1e-6)


def test_the_path_of_one_unfolding_visits_every_rank():
    options = path(MATRIX)
    assert [option.layer.ranks for option in options] == [(1,), (2,), (3,), (4,)]
    errors = [option.error for option in options]
    assert errors == pytest.approx([(14 / 30) ** 0.5, (5 / 30) ** 0.5, (1 / 30) ** 0.5, 0], abs=1e-6)


def test_a_path_has_no_more_options_than_steps():
    wide = candidate(torch.randn(64, 80, generator=torch.Generator().manual_seed(0)))
    ranks = [option.layer.ranks[0] for option in path(wide, 10)]
    assert len(ranks) == 10
    assert ranks[0] == 1
    assert ranks[-1] == 64
