"""EVBMF: planted ranks found, at every scale, for noise and for exactly low-rank weights, and as the formula says."""

import math

import numpy as np
import pytest
import torch
from rank_cases import CONV_METHODS, chosen, context, conv_weight
from torch import Tensor

from hodec.errors import ConfigError
from hodec.linalg.svd import singular_values
from hodec.ranks import Choice, LayerContext
from hodec.ranks.evbmf import signals
from hodec.ranks.vbmf import Vbmf

SCALES = [1e-20, 1e-4, 1e-3, 1e-2, 1.0, 1e2, 1e4, 1e15]


def planted(rank: int, strength: float, rows: int = 64, cols: int = 576) -> Tensor:
    """Unit noise, drawn first, plus ``strength`` times a product of two unit normal matrices; float64."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((rows, cols))
    return torch.from_numpy(noise + strength * rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols)))


def exact(rank: int = 16, rows: int = 64, cols: int = 576) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols)))


def vbmf(one: LayerContext, ratio: float = 0.0, **limits: int) -> Choice:
    return chosen(Vbmf(ratio, **limits), one)


def vbmf_rank(matrix: Tensor) -> int:
    """EVBMF's rank of a matrix, at least 1."""
    return max(1, signals(singular_values(matrix), *matrix.shape))


# -- golden values --------------------------------------------------------------------------------------

GOLDEN = {
    "planted 8": (planted(8, 1.0), 8),
    "planted 24, weak": (planted(24, 24**-0.5), 18),
    "planted 24, strong": (planted(24, 1.0), 24),
    "planted 64, weak": (planted(64, 1 / 16, 256, 2304), 23),
    "exactly low rank": (exact(), 16),
    "exactly low rank, float32": (exact().float(), 16),
    "noise": (planted(1, 0.0), 1),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_ranks(case: str):
    matrix, rank = GOLDEN[case]
    assert vbmf_rank(matrix) == rank


@pytest.mark.parametrize("case", [name for name in GOLDEN if "64" not in name])
def test_the_scale_of_the_weights_does_not_matter(case: str):
    matrix, rank = GOLDEN[case]
    assert [vbmf_rank(matrix * scale) for scale in SCALES] == [rank] * len(SCALES)


@pytest.mark.parametrize("case", GOLDEN)
def test_tall_matrices_are_as_good_as_wide_ones(case: str):
    matrix, rank = GOLDEN[case]
    assert vbmf_rank(matrix.T) == rank


@pytest.mark.parametrize("rank", [1, 5, 16, 40, 57])
def test_exactly_low_rank_weights_have_their_rank_up_to_the_limit(rank: int):
    """57 is ceil(64 / (1 + 64 / 576)) - 1, above which EVBMF takes signals for noise."""
    assert vbmf_rank(exact(rank)) == rank


def test_a_decaying_spectrum_has_one_answer_at_every_scale():
    noise = planted(1, 0.0, 128, 1152).float()
    u, s, vh = torch.linalg.svd(noise, full_matrices=False)
    decaying = (u * (s[0] * torch.arange(1, 129) ** -0.5)) @ vh
    assert len({vbmf_rank(decaying * scale) for scale in (1e-3, 0.005, 1.0, 100.0)}) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (5, 7), (16, 16)])
@pytest.mark.parametrize("fill", [torch.zeros, torch.ones, torch.randn], ids=["zeros", "ones", "noise"])
def test_small_and_empty_handed_matrices_have_rank_1(shape: tuple[int, int], fill: object):
    assert vbmf_rank(fill(shape)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_see_the_same_signals(dtype: torch.dtype):
    assert vbmf_rank(planted(8, 1.0).to(dtype)) == 8


# -- against the formula, one number at a time ---------------------------------------------------------------------


def free_energy(squares: list[float], variance: float, a: float, limit: float) -> float:
    total = 0.0
    for square in squares:
        x = square / variance
        total += x - math.log(x)
        if x > limit:
            tau = (x - (1 + a) + math.sqrt((x - (1 + a)) ** 2 - 4 * a)) / 2
            total += math.log(tau + 1) + a * math.log(tau / a + 1) - tau
    return total


def slow_rank(matrix: Tensor) -> int:
    """EVBMF by exhaustive search over the noise variance."""
    short, long = sorted(matrix.shape)
    a = short / long
    root = 2.5129 * math.sqrt(a)
    limit = (1 + root) * (1 + a / root)
    squares = [float(s) ** 2 / long for s in torch.linalg.svdvals(matrix.double())]
    rest = squares[math.ceil(short / (1 + a)) - 1 :]
    low, high = max(rest[0] / limit, sum(rest) / len(rest)), sum(squares) / short
    tried = [low * (high / low) ** (i / 1500) for i in range(1501)]
    variance = min(tried, key=lambda v: free_energy(squares, v, a, limit))
    return max(1, sum(square > variance * limit for square in squares))


@pytest.mark.parametrize("shape", [(12, 60), (20, 30), (30, 30), (40, 8)])
@pytest.mark.parametrize("strength", [0.1, 0.3, 1.0])
def test_it_is_what_the_formula_gives(shape: tuple[int, int], strength: float):
    for rank in (2, 5):
        matrix = planted(rank, strength, *shape)
        assert vbmf_rank(matrix) == slow_rank(matrix)


def test_singular_values_left_out_count_as_zero():
    values = singular_values(exact(5))
    assert signals(values[:5], 64, 576) == signals(values, 64, 576) == 5


# -- recommendation ratio --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "full", "c", "expected"),
    [
        (32, 64, 0.2, 38),
        (32, 64, -0.2, 26),
        (32, 64, 0.0, 32),
        (32, 64, 1.0, 64),
        (32, 64, -1.0, 1),
        (40, 64, -1.0, 16),
        (1, 64, -0.5, 1),
        (64, 64, 1.0, 64),
        (64, 64, -1.0, 64),
        (10, 110, 0.29, 39),  # 0.29 * 100 is 28.999999999999996
        (1, 1, 0.7, 1),
    ],
)
def test_a_ratio_gives_back_or_removes_a_share_of_what_was_removed(rank: int, full: int, c: float, expected: int):
    assert Vbmf(c).recommended(rank, full) == expected


@pytest.mark.parametrize("c", [-1.01, 1.5, 20, float("nan"), "0.2", None, True], ids=repr)
def test_ratios_out_of_range_are_refused(c: object):
    with pytest.raises(ConfigError, match="^recommendation_ratio: .* given; allowed: a number at least -1"):
        Vbmf(c)


# -- the rule ------------------------------------------------------------------------------------------------------


def tucker_weight(inp_rank: int = 3, out_rank: int = 7) -> Tensor:
    """Kernel (32, 24, 3, 3) of the given channel ranks plus a little noise."""
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(out_rank, inp_rank, 3, 3, generator=generator)
    outer = torch.linalg.qr(torch.randn(32, out_rank, generator=generator))[0]
    inner = torch.linalg.qr(torch.randn(24, inp_rank, generator=generator))[0]
    return torch.einsum("or,rshw,is->oihw", outer, core, inner) + 1e-3 * torch.randn(32, 24, 3, 3, generator=generator)


def test_the_rule_needs_trained_weights():
    assert Vbmf.name == "vbmf"
    assert Vbmf.reads_weights


def test_tucker_has_the_ranks_of_its_two_unfoldings_ordered_in_out():
    assert vbmf(context(tucker_weight(), "tucker")) == Choice((3, 7))
    small = context(tucker_weight() * 1e-3, "tucker")
    assert vbmf(small) == Choice((3, 7))


@pytest.mark.parametrize(("method", "rank"), [("svd", 7), ("weight_svd", 3)])
def test_matrix_splits_have_the_rank_of_their_matrix(method: str, rank: int):
    assert vbmf(context(tucker_weight(), method)).ranks == (rank,)


@pytest.mark.parametrize("method", CONV_METHODS)
def test_every_method_gets_ranks_that_fit(method: str):
    for weight in (tucker_weight(), tucker_weight() * 1e-4, torch.zeros(32, 24, 3, 3)):
        one = context(weight, method)
        for ratio in (-1.0, 0.0, 0.3, 1.0):
            ranks = vbmf(one, ratio).ranks
            assert one.planned(ranks).ranks == ranks
    assert vbmf(context(tucker_weight(), method), 1.0).ranks == context(tucker_weight(), method).full_ranks


def test_the_ratio_is_applied_to_each_side_and_noted():
    choice = vbmf(context(tucker_weight(), "tucker"), 0.2)
    assert choice.ranks == (3 + 4, 7 + 5)
    assert choice.notes == ("VBMF's ranks [3, 7] became [7, 12] by recommendation ratio 0.2",)


def test_pure_noise_has_rank_1_and_says_so():
    choice = vbmf(context(conv_weight(64, 64), "tucker"))
    assert choice == Choice((1, 1), ("VBMF finds only noise for rank 1, 2 of 2: kept at 1",))


def test_limits_are_obeyed_and_noted():
    one = context(tucker_weight(), "svd")
    assert vbmf(one, round_to=4) == Choice((8,), ("ranks [7] became [8]: round_to=4",))
    assert vbmf(one, max_rank=5).ranks == (5,)
    assert vbmf(one, min_rank=9).ranks == (9,)
