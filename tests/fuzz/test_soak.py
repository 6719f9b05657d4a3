"""Nothing grows over hundreds of epochs."""

import pytest
from soak import growth, soak

EPOCHS = 500
# MiB of 100 epochs that the allocator's own scatter may look like; one kept tensor a step would be 2 MiB or more.
SCATTER = 1.0
# Bytes of an epoch that checkpoints may keep: two checkpoints, a few numbers each.
RECORD = 64


@pytest.mark.slow
def test_500_epochs_under_admm_keep_their_memory_and_files(tmp_path):
    looks = soak(tmp_path / "run", EPOCHS)
    found = growth(looks)
    assert found["epochs"] > 0.95 * EPOCHS  # ADMM may have converged a few epochs before
    assert found["looks"] > EPOCHS / 5
    assert found["MiB for 100 epochs"] < SCATTER, found
    assert found["files more"] <= 0, found
    assert found["bytes more"] <= RECORD * EPOCHS, found
