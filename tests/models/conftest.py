import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def trained_weights():
    """Path of a file of published weights by name; skips where they are not at hand."""

    def find(name: str) -> Path:
        folder = os.environ.get("HODEC_DATA")
        if not folder:
            pytest.skip("HODEC_DATA is not set: no published weights at hand")
        for path in (Path(folder) / name, Path(folder) / "weights" / name):
            if path.is_file():
                return path
        return pytest.skip(f"no {name} in HODEC_DATA")

    return find
