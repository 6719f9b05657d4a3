"""Tensor trains: error bounds, agreement with tensorly, stored sizes, mode order."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hodec.errors import RankError
from hodec.formats import tt
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes


@pytest.fixture
def decomposition() -> ModuleType:
    """tensorly's decompositions, as the oracle."""
    return pytest.importorskip("tensorly.decomposition")


def tails(x: Tensor, ranks: tuple[int, ...]) -> list[float]:
    """Squared norm of the singular values that rank r_k drops from each unfolding: what no method can keep."""
    return [
        float(torch.linalg.svdvals(x.reshape(math.prod(x.shape[:k]), -1))[rank:].square().sum())
        for k, rank in enumerate(ranks, start=1)
    ]


@st.composite
def tensors_and_ranks(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    ranks = tt.fit_ranks(shape, draw(st.lists(st.integers(1, 8), min_size=len(shape) - 1, max_size=len(shape) - 1)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * draw(st.sampled_from([1.0, 1e-6, 1e6])), ranks


@settings(deadline=None, max_examples=60)
@given(tensors_and_ranks())
def test_the_error_lies_between_the_largest_tail_and_the_root_of_their_sum(drawn: tuple[Tensor, tuple[int, ...]]):
    """Source: Oseledets, Tensor-Train Decomposition, SIAM J. Sci. Comput. 33(5), 2011: Theorem 2.2."""
    x, ranks = drawn
    cores = tt.decompose(x, ranks)
    assert [tuple(core.shape) for core in cores] == list(zip((1, *ranks), x.shape, (*ranks, 1)))
    error, dropped, slack = float((tt.reconstruct(cores) - x).norm()), tails(x, ranks), 1e-10 * float(x.norm())
    assert math.sqrt(max(dropped)) - slack <= error <= math.sqrt(sum(dropped)) + slack


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.data())
def test_fitted_ranks_leave_no_rank_that_cannot_be_used(shape: list[int], data: st.DataObject):
    wanted = data.draw(st.lists(st.integers(1, 50), min_size=len(shape) - 1, max_size=len(shape) - 1))
    ranks = tt.fit_ranks(shape, wanted)
    r = (1, *ranks, 1)
    assert all(1 <= fit <= want for fit, want in zip(ranks, wanted))
    assert all(fit <= top for fit, top in zip(ranks, tt.max_ranks(shape)))
    for k in range(1, len(shape)):
        assert r[k] <= min(r[k - 1] * shape[k - 1], r[k + 1] * shape[k])
    assert tt.fit_ranks(shape, ranks) == ranks
    assert tt.fit_ranks(shape, tt.max_ranks(shape)) == tt.max_ranks(shape)


@pytest.mark.parametrize("shape", [(6, 5, 4), (4, 9, 8, 3), (3, 4, 9, 4, 5)], ids=str)
@pytest.mark.parametrize("cap", [2, 3, 6])
def test_error_equals_tensorlys(
    shape: tuple[int, ...], cap: int, generator: torch.Generator, decomposition: ModuleType
):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    ranks = tt.fit_ranks(shape, [cap] * (len(shape) - 1))
    theirs = decomposition.tensor_train(x.numpy(), rank=[1, *ranks, 1]).to_tensor()
    mine = tt.reconstruct(tt.decompose(x, ranks))
    error = float((mine - x).norm())
    assert error == pytest.approx(float(np.linalg.norm(theirs - x.numpy())), rel=1e-8)
    torch.testing.assert_close(mine, torch.from_numpy(np.ascontiguousarray(theirs)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("rank_in", "rank_out"), [(4, 6), (8, 8), (2, 10)])
def test_one_mode_a_side_is_tucker_2(
    rank_in: int, rank_out: int, generator: torch.Generator, decomposition: ModuleType
):
    """Within 1 % of the iterated optimum where channels matter unequally, as in trained kernels."""
    w = torch.randn(16, 12, 3, 3, generator=generator, dtype=torch.float64)
    mix_out, mix_in = (torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for n in (16, 12))
    decay_out, decay_in = (torch.arange(1, n + 1).double() ** -0.5 for n in (16, 12))
    w = torch.einsum("oihw,o,i,ao,bi->abhw", w, decay_out, decay_in, mix_out, mix_in)
    theirs = decomposition.partial_tucker(w.numpy(), rank=[rank_out, rank_in], modes=[0, 1])
    (core, factors), _ = theirs
    rebuilt = np.einsum("ab...,oa,ib->oi...", core, *factors)
    optimum = float(np.linalg.norm(rebuilt - w.numpy()))
    mine = tt.project(w, (rank_in, rank_out), Modes((12,), (16,)))
    assert optimum * (1 - 1e-9) <= float((mine - w).norm()) <= optimum * 1.01


@pytest.mark.parametrize(("dims", "expected"), [(3, 2040), (4, 3850), (5, 5760)])
def test_golden_storage(dims: int, expected: int):
    cores = tt.decompose(torch.ones((16, 17, 18, 19, 20)[:dims]), [10] * (dims - 1))
    assert sum(core.numel() for core in cores) == expected


def test_what_one_mode_a_side_stores():
    """Stage ranks (9, 18, 27) of a CIFAR ResNet: C x r, r x r x 9, r x C."""
    for channels, rank in ((16, 9), (32, 18), (64, 27)):
        expected = 2 * channels * rank + 9 * rank * rank
        assert tt.CONV.params((channels, channels, 3, 3), (rank, rank), Modes((channels,), (channels,))) == expected


def test_the_mode_order_is_inputs_kernel_outputs():
    """Each number of the weight lands where the order says: i1 and o1 are the slow digits of their channel."""
    o, i, k = 6, 8, 3
    w = torch.arange(o * i * k * k, dtype=torch.float64).reshape(o, i, k, k)
    modes = Modes((2, 4), (3, 2))
    x = tt.CONV.tensorize(w[None], modes)[0]
    assert x.shape == (2, 4, 9, 3, 2)
    for i1, i2, row, col, o1, o2 in np.ndindex(2, 4, 3, 3, 3, 2):
        assert x[i1, i2, row * 3 + col, o1, o2] == w[o1 * 2 + o2, i1 * 4 + i2, row, col]
    torch.testing.assert_close(tt.CONV.to_weight(x[None], w.shape, modes)[0], w, rtol=0, atol=0)


def test_the_mode_order_of_a_linear_layer_pairs_output_with_input():
    w = torch.arange(48.0).reshape(6, 8)
    modes = Modes((2, 4), (3, 2))
    x = tt.LINEAR.tensorize(w[None], modes)[0]
    assert x.shape == (3 * 2, 2 * 4)
    for o1, i1, o2, i2 in np.ndindex(3, 2, 2, 4):
        assert x[o1 * 2 + i1, o2 * 4 + i2] == w[o1 * 2 + o2, i1 * 4 + i2]
    torch.testing.assert_close(tt.LINEAR.to_weight(x[None], w.shape, modes)[0], w, rtol=0, atol=0)


def test_a_kronecker_product_is_a_linear_tensor_train_of_rank_one(generator: torch.Generator):
    a, b = torch.randn(3, 2, generator=generator).double(), torch.randn(2, 4, generator=generator).double()
    w = torch.kron(a, b)
    torch.testing.assert_close(tt.project(w, (1,), Modes((2, 4), (3, 2))), w, rtol=1e-10, atol=1e-10)


def test_project_finds_the_modes_that_the_number_of_ranks_asks_for(generator: torch.Generator):
    w = torch.randn(16, 8, 3, 3, generator=generator, dtype=torch.float64)
    for d, ranks in ((1, (4, 5)), (2, (2, 4, 6, 4)), (3, (2, 3, 4, 5, 4, 2))):
        explicit = tt.project(w, ranks, Modes.split(8, 16, d))
        torch.testing.assert_close(tt.project(w, ranks), explicit, rtol=0, atol=0)
    linear = w[:, :, 0, 0]
    explicit = tt.project(linear, (3,), Modes.split(8, 16, 2))
    torch.testing.assert_close(tt.project(linear, (3,)), explicit, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [(), (0, 2), (2, 0), (7, 2), (2, 5), (2,), (2, 2, 2), (-1, 2)])
def test_bad_ranks_are_refused_by_decompose(ranks: tuple[int, ...]):
    with pytest.raises(RankError):
        tt.decompose(torch.ones(6, 5, 4), ranks)


@pytest.mark.parametrize("ranks", [(4,), (4, 4, 4), (0, 4), (13, 4), (4, 17), (2, 4, 4, 5)])
def test_bad_ranks_are_refused_by_project(ranks: tuple[int, ...]):
    with pytest.raises(RankError):
        tt.project(torch.ones(16, 12, 3, 3), ranks)


def test_a_kernel_that_is_not_square(generator: torch.Generator):
    w = torch.randn(6, 4, 3, 1, generator=generator, dtype=torch.float64)
    full = tt.CONV.max_ranks(w.shape, Modes((4,), (6,)))
    assert full == (4, 6)
    torch.testing.assert_close(tt.project(w, full), w, rtol=1e-10, atol=1e-10)


def test_merging_wins_unless_the_chain_saves_more_than_its_rate_costs():
    """Inner ranks near full: the chain does more. Inner rank small beside its mode: the chain does far less."""
    modes, shape, call_sites = Modes((16, 32), (16, 32)), (512, 512, 3, 3), CallSites.once((7, 7), (7, 7))
    assert tt.CONV.choose_execution(shape, (15, 250, 250, 15), modes, call_sites=call_sites) == "merged"
    assert tt.CONV.choose_execution(shape, (2, 8, 8, 2), modes, call_sites=call_sites) == "chain"
