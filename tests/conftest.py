"""What every test has: one thread, seeded random numbers, real data only where somebody points to it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads cost more than they bring, and change the last bits

HERE = Path(__file__).parent
# Here a warning is a failure. Other folders run libraries whose warnings nobody here can mend.
WARNINGS_FAIL = [
    "contract", "formats", "layers", "linalg", "plan", "conversion", "io", "cost", "ranks", "test_errors.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: an address in a name differs in each process; give ids=[...]")
        if item.path.is_relative_to(HERE) and item.path.relative_to(HERE).parts[0] in WARNINGS_FAIL:
            # put first, so that a test's own filterwarnings marks win
            item.add_marker(pytest.mark.filterwarnings("error"), append=False)


@pytest.fixture(autouse=True)
def _seeded():
    """Networks draw their weights from the global generator."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of this test's own."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the metrics of one whole run of every phase, for tests that only read it."""
    from tiny_runs import FINISHED, tiny

    from hodec.experiment import pipeline

    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, pipeline.run(tiny(**FINISHED), folder)


@pytest.fixture(scope="session")
def hodec_data() -> Path:
    """The folder of real data sets, e.g. with ``cifar10-jpeg/train/<class>/*.jpg`` inside."""
    given = os.environ.get("HODEC_DATA", "")
    if not given:
        pytest.skip("HODEC_DATA is not set: name a folder that holds data sets, e.g. cifar10-jpeg/train/<class>/*.jpg")
    if not Path(given).is_dir():
        pytest.skip(f"HODEC_DATA={given} is not a folder")
    return Path(given)
