"""How much a layer's squared relative error counts against another's: by hand, by its norm, by measured scores."""

import math
from collections.abc import Mapping
from typing import Any

from hodec.conversion.eligibility import match_names
from hodec.errors import ConfigError
from hodec.ranks.base import Candidate
from hodec.ranks.greedy.stats import GreedyStats
from hodec.ranks.spectra import relative_error, spectra

Weights = Mapping[str, float] | str | GreedyStats | None


def checked_weights(weights: Any) -> Weights:
    """``weights``, if they are what ``importance`` takes.

    Raises:
        ConfigError: anything else.
    """
    if weights is None or weights == "norm" or isinstance(weights, GreedyStats):
        return weights
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"ranks.weights={weights!r} is not allowed: give norm, '{{layer1.*: 2.0}}', in Python also Greedy's stats"
        )
    for glob, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"ranks.weights: {glob}={value!r} is not a number of at least 0, e.g. {{{glob}: 2}}")
    return {str(glob): float(value) for glob, value in weights.items()}


def importance(weights: Weights, candidates: Mapping[str, Candidate]) -> dict[str, float]:
    """Layer -> weight of its squared relative error, at least 0.

    Raises:
        PlanError: a glob that matches no layer.
    """
    if weights == "norm":
        return _by_norm(candidates)
    if isinstance(weights, GreedyStats):
        return _by_scores(weights, candidates)
    given, names = weights if isinstance(weights, Mapping) else {}, list(candidates)
    matched = {n: w for glob, w in given.items() for n in match_names(glob, names, "ranks.weights")}
    return {name: matched.get(name, 1.0) for name in names}


def _by_norm(candidates: Mapping[str, Candidate]) -> dict[str, float]:
    squares = {name: float(c.site.weight.double().square().sum()) for name, c in candidates.items()}
    total = sum(squares.values()) or 1.0
    return {name: square / total for name, square in squares.items()}


def _by_scores(stats: GreedyStats, candidates: Mapping[str, Candidate]) -> dict[str, float]:
    """Score that the layer's candidates lost, per squared relative error they made; 1 on average.

    Layers without scores, or whose candidates lost nothing that counts, weigh the least of the others.
    """
    found = {}
    for name, candidate in candidates.items():
        points, parts = stats.table.get(name, ()), spectra(candidate)
        lost = sum(max(0.0, stats.baseline - point.score) for point in points)
        made = sum(
            relative_error(parts, point.ranks) ** 2 for point in points if len(point.ranks) == len(candidate.most)
        )
        if lost > 0 and made > 0:
            found[name] = lost / made
    least, mean = min(found.values(), default=1.0), sum(found.values()) / len(found) if found else 1.0
    return {name: found.get(name, least) / mean for name in candidates}
