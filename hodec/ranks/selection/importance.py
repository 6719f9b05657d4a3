"""How much a layer's squared relative error counts against another's: by hand, by its norm, by measured scores."""

from collections.abc import Mapping

from hodec.conversion.eligibility import match_names
from hodec.ranks.context import LayerContext
from hodec.ranks.greedy.stats import GreedyStats
from hodec.ranks.spectra import relative_error, truncation_spectra

Weights = Mapping[str, float] | str | GreedyStats | None


def importance(weights: Weights, layers: Mapping[str, LayerContext]) -> dict[str, float]:
    """Layer -> weight of its squared relative error, at least 0.

    Raises:
        PlanError: a glob that matches no layer.
    """
    if weights == "norm":
        return _by_norm(layers)
    if isinstance(weights, GreedyStats):
        return _by_scores(weights, layers)
    by_glob, names = weights if isinstance(weights, Mapping) else {}, list(layers)
    matched = {n: float(w) for glob, w in by_glob.items() for n in match_names(str(glob), names, "ranks.weights")}
    return {name: matched.get(name, 1.0) for name in names}


def _by_norm(layers: Mapping[str, LayerContext]) -> dict[str, float]:
    squares = {name: float(layer.site.values().double().square().sum()) for name, layer in layers.items()}
    total = sum(squares.values()) or 1.0
    return {name: square / total for name, square in squares.items()}


def _by_scores(stats: GreedyStats, layers: Mapping[str, LayerContext]) -> dict[str, float]:
    """Score that the layer's ratios lost, per squared relative error they made; 1 on average.

    Layers without scores, or whose ratios lost nothing that counts, weigh the least of the others.
    """
    weights = {}
    for name, layer in layers.items():
        points, spectra = stats.curves.get(name, ()), truncation_spectra(layer)
        lost = sum(max(0.0, stats.baseline - point.score) for point in points)
        made = sum(
            relative_error(spectra, point.ranks) ** 2 for point in points if len(point.ranks) == len(layer.full_ranks)
        )
        if lost > 0 and made > 0:
            weights[name] = lost / made
    least, mean = min(weights.values(), default=1.0), sum(weights.values()) / len(weights) if weights else 1.0
    return {name: weights.get(name, least) / mean for name in layers}
