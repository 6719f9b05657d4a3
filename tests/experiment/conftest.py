"""Runs that do not measure milliseconds, so that equal runs have equal metrics."""

from collections.abc import Iterator

import pytest

from hodec.experiment import results


@pytest.fixture(autouse=True, scope="session")
def _fixed_latency() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(results, "latency", lambda nets, run: dict.fromkeys(nets, 1.0))
        yield
