"""The oldest versions that pyproject.toml allows: an environment of exactly these passes the fast tests.

Slow: some minutes to install, and as long as the fast tests take. Needs uv on the path, and an index or uv's cache.

    pytest -m slow -n 0 tests/test_oldest.py
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("uv") is None, reason="uv makes the environment"),
]
ROOT = Path(__file__).parents[1]
PYTHON = "3.11"  # the first of requires-python
COPIED = (
    "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "requirements.lock",
    "mkdocs.yml", "train.py", ".ci", "hodec", "conf", "tests", "docs", "notebooks", "benchmarks", "experiments",
)  # fmt: skip


def uv(*command: str | Path) -> None:
    subprocess.run(["uv", *map(str, command)], check=True, timeout=1800)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tree, beside an environment ``env`` of the oldest versions."""
    folder = tmp_path_factory.mktemp("oldest")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    # only what is named in pyproject.toml is the oldest: what these need in turn is for them to say
    oldest = ("--resolution", "lowest-direct", "--python-version", PYTHON, "--extra", "dev")
    uv("pip", "compile", "-q", folder / "pyproject.toml", *oldest, "-o", folder / "oldest.txt")
    uv("venv", "-q", "--python", PYTHON, folder / "env")
    python = ("--python", folder / "env" / "bin" / "python")
    uv("pip", "install", "-q", *python, "-r", folder / "oldest.txt")
    uv("pip", "install", "-q", *python, "--no-deps", "-e", folder)
    return folder


def test_the_fast_tests_pass_on_the_oldest_versions(checkout):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [str(checkout / "env" / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
