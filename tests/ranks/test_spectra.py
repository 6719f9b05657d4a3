"""Singular values read as what each rank loses, and the path of sensible ranks."""

from dataclasses import replace

import pytest
import torch
from rank_cases import CONV_METHODS, context, conv_weight, with_singular_values

from hodec.methods import METHODS
from hodec.ranks.spectra import (
    TruncationLoss,
    cached_truncation_spectra,
    ranks_for_tail,
    relative_error,
    truncation_spectra,
)

VALUES = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)  # squares 16, 9, 4, 1 of 30
MATRIX = context(with_singular_values(VALUES, 4, 9))


def test_a_spectrum_holds_shares_of_the_squared_norm_and_what_each_rank_loses():
    (one,) = truncation_spectra(MATRIX)
    assert one.position == 0
    torch.testing.assert_close(one.energy, VALUES.square() / 30)
    torch.testing.assert_close(one.tails, torch.tensor([30.0, 14, 5, 1, 0], dtype=torch.float64) / 30)


@pytest.mark.parametrize(("share", "rank"), [(0, 4), (0.03, 4), (0.04, 3), (0.17, 2), (0.5, 1), (1, 1)])
def test_the_least_rank_that_loses_no_more_than_a_share(share: float, rank: int):
    (one,) = truncation_spectra(MATRIX)
    assert one.rank_for_tail(share) == rank
    assert ranks_for_tail([one], share, 1) == [rank]


def test_a_zero_weight_has_rank_1_and_no_error():
    zero = context(torch.zeros(4, 9))
    (one,) = truncation_spectra(zero)
    assert one.rank_for_tail(0) == 1
    assert relative_error([one], [1]) == 0
    assert TruncationLoss([one]).path(128) == [[1]]


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_shares_do_not_depend_on_the_scale(scale: float):
    (one,), (other,) = truncation_spectra(MATRIX), truncation_spectra(context(MATRIX.site.weight * scale))
    torch.testing.assert_close(one.energy, other.energy)


@pytest.mark.parametrize("method", CONV_METHODS)
def test_the_relative_error_bounds_the_error_of_the_projection(method: str):
    one = context(conv_weight(12, 6).double(), method)
    found = truncation_spectra(one)
    assert {spectrum.position for spectrum in found} == set(range(len(one.full_ranks)))
    weight = one.site.weight
    for share in (0.0, 0.1, 0.4, 0.9):
        ranks = one.fit(ranks_for_tail(found, share, len(one.full_ranks)))
        real = float((weight - one.format.project(weight, ranks, one.modes)).norm() / weight.norm())
        bound = relative_error(found, ranks)
        assert real <= bound + 1e-6
        if len(found) == 1 and not one.format.iterative:
            assert real == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize("method", CONV_METHODS)
def test_the_path_goes_from_full_to_least_ranks(method: str):
    one = context(conv_weight(), method)
    loss = TruncationLoss(truncation_spectra(one))
    fitted = [one.fit(ranks) for ranks in loss.path(128)]
    assert fitted[0] == one.full_ranks
    assert fitted[-1] == one.fit([1] * len(one.full_ranks))
    assert fitted == sorted(fitted, reverse=True)
    losses = [loss.at(ranks) for ranks in loss.path(128)]
    assert losses == sorted(losses)
    assert losses[0] == pytest.approx(0, abs=1e-12)


def test_the_path_of_one_unfolding_visits_every_rank():
    loss = TruncationLoss(truncation_spectra(MATRIX))
    assert loss.path(128) == [[4], [3], [2], [1]]
    assert [loss.at([rank]) for rank in range(1, 5)] == pytest.approx([14 / 30, 5 / 30, 1 / 30, 0], abs=1e-12)


def test_a_path_has_no_more_ranks_than_steps():
    wide = context(torch.randn(64, 80, generator=torch.Generator().manual_seed(0)))
    ranks = [ranks[0] for ranks in TruncationLoss(truncation_spectra(wide)).path(10)]
    assert len(ranks) == 10
    assert (ranks[0], ranks[-1]) == (64, 1)


@pytest.mark.parametrize("weight", [torch.ones(1, 8).mT, torch.ones(1, 1, 8).movedim(2, 0), torch.ones(4, 4)[:1, ::4]])
def test_weights_of_any_strides_are_remembered_by_their_numbers(weight: torch.Tensor):
    (one,), (other,) = (cached_truncation_spectra(context(w)) for w in (weight, weight.clone().contiguous()))
    torch.testing.assert_close(one.energy, other.energy)


def test_groups_of_equal_weights_have_spectra_of_their_own():
    weight = conv_weight(24, 12)
    found = []
    for groups in (2, 4):
        one = context(weight)
        found.append(cached_truncation_spectra(replace(one, format=METHODS["svd"].format("conv2d", groups))))
    assert [len(spectrum.energy) for (spectrum,) in found] == [12, 6]
