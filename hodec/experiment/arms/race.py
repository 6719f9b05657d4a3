"""The order of a comparison: each arm chooses by the first seed, then all seeds are run and tested."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hodec.errors import ConfigError, TrainingError, near_matches
from hodec.experiment.arms.spec import Candidate, Comparison
from hodec.experiment.arms.trial import Trial, run_trial
from hodec.experiment.data.images import ImageData, build_data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """What is known of one arm.

    Attributes:
        tried: a trial of each candidate at the first seed, not tested.
        chosen: that of the highest validation accuracy.
        runs: its trials over the seeds, tested, as far as they have been made.
    """

    tried: Sequence[Trial]
    chosen: Candidate
    runs: tuple[Trial, ...] = ()


def race(
    comparison: Comparison, root: Path, *, only: Collection[str] = (), report: Callable[[Mapping[str, Arm]], None]
) -> dict[str, Arm]:
    """Run what has not been run yet.

    Args:
        root: folder of the comparison, with a folder a run; a stopped comparison goes on there.
        only: arms to run; by default all.
        report: called with what is known so far, after each tested run.

    Returns:
        Name of an arm -> what is known of it.

    Raises:
        ConfigError: ``only`` names no arm.
        TrainingError: an arm broke down with every one of its candidates.
    """
    for name in only:
        if name not in comparison.arms:
            raise ConfigError(f"only: {name!r} given; allowed: an arm.{near_matches(name, [*comparison.arms])}")
    first = next(iter(comparison.arms.values()))[0]
    data = cache(lambda: _data(first))  # the same for all: read_comparison has seen to that
    arms = {}
    for name, candidates in comparison.arms.items():
        if not only or name in only:
            arms[name] = choose(name, [run_trial(one, comparison.seeds[0], root, data) for one in candidates])
    for seed in comparison.seeds:
        for name, arm in arms.items():
            done = run_trial(arm.chosen, seed, root, data, test=True)
            arms[name] = Arm(arm.tried, arm.chosen, (*arm.runs, done))
            report(arms)
    return arms


def _data(candidate: Candidate) -> ImageData:
    data = build_data(candidate.config.data)
    data.check()
    return data


def choose(name: str, tried: Sequence[Trial]) -> Arm:
    """The arm with its best candidate; the first of equals.

    Raises:
        TrainingError: training broke down with each.
    """
    sound = [trial for trial in tried if math.isfinite(trial.validation)]
    if not sound:
        raise TrainingError(f"arm {name!r} broke down with each of its candidates; the first: {tried[0].error}")
    return Arm(tried, max(sound, key=lambda trial: trial.validation).candidate)
