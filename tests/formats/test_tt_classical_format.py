"""The classical tensor train: golden costs, and that it is the costlier baseline."""

import numpy as np
import torch

from hodec.formats import tt, tt_classical
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes

# layer3.0.conv1 of ResNet-18: 128 -> 256 channels, 3x3, stride 2, 28x28 -> 14x14
SHAPE, RUNS, DENSE_MACS = (256, 128, 3, 3), CallSites.once((28, 28), (14, 14)), 57_802_752
MODES = Modes.split(128, 256, 2)


def test_golden_cost_is_more_than_dense():
    assert Modes((8, 16), (16, 16)) == MODES
    assert tt_classical.CONV.params(SHAPE, (16, 16), MODES) == 37_008
    macs = tt_classical.CONV.macs(SHAPE, (16, 16), MODES, call_sites=RUNS, execution="chain")
    assert macs == 119_218_176 > DENSE_MACS


def test_hodecs_order_costs_less_at_as_many_parameters():
    ranks = (8, 48, 48, 8)
    stored = tt.CONV.params(SHAPE, ranks, MODES)
    assert 0.8 < stored / 37_008 < 1.2
    for execution in tt.CONV.executions:
        macs = tt.CONV.macs(SHAPE, ranks, MODES, call_sites=RUNS, execution=execution)
        assert macs < DENSE_MACS / 2
    same_cap = tt.CONV.fit_ranks(SHAPE, MODES, [16] * 4)
    assert tt.CONV.macs(SHAPE, same_cap, MODES, call_sites=RUNS, execution="merged") < DENSE_MACS / 5


def test_the_kernel_core_comes_first_then_paired_channels():
    w = torch.arange(6 * 8 * 9.0).reshape(6, 8, 3, 3)
    modes = Modes((2, 4), (3, 2))
    x = tt_classical.CONV.tensorize(w[None], modes)[0]
    assert x.shape == (9, 2 * 3, 4 * 2)
    for row, col, i1, o1, i2, o2 in np.ndindex(3, 3, 2, 3, 4, 2):
        assert x[row * 3 + col, i1 * 3 + o1, i2 * 2 + o2] == w[o1 * 2 + o2, i1 * 4 + i2, row, col]
    torch.testing.assert_close(tt_classical.CONV.to_weight(x[None], w.shape, modes)[0], w, rtol=0, atol=0)


def test_the_kernel_rank_is_at_most_the_kernels_size():
    assert tt_classical.CONV.fit_ranks(SHAPE, MODES, (16, 16)) == (9, 16)
    assert tt_classical.CONV.max_ranks((256, 128, 1, 1), MODES)[0] == 1
