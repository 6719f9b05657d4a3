"""What a compressed file loses: a task's score, or how far its outputs agree with the dense file's on held-out data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hodec.calibration.data import Feeds, Samples
from hodec.errors import ConfigError, DataError
from hodec.export.runtime import Array
from hodec.onnx_graph.chance import CONFIDENCE, Loss, Record, Run, differing, loss_of, needed, recorded

Numbers = NDArray[np.float64]

# Share of the dense score that may be lost where nothing is said.
MAX_DROP = "1%"
# Share of the allowed loss that may be used where chance cannot be told. The best of some ten trials on one set of data
# looks better than it is: of eight public files two lost 0.84 and 0.86 points there and 1.10 points each on others.
MARGIN = 0.75
# The same where outputs are compared as numbers: a relative error of 5 % changes few decisions.
ERROR_DROP = "5%"


@dataclass(frozen=True)
class Judge:
    """A score, higher is better, and how much of it may be lost.

    Attributes:
        words: what the score is, for people: ``"agreement of top-1 on 12 held-out samples"``.
        score: of a file, by its runs.
        dense: the dense file's score.
        allowed: the most that may be lost of it, in its own unit.
        scale: what the score is multiplied by to be printed.
        unit: what is printed behind it.
        answers: what the dense file answered while it was scored; None where that is not known.
        confidence: that no more than is allowed is lost on other inputs, 0.5 to 1.
        calls: that the score is made of, in this order; empty where that is not known.
        best_of: outputs of the first of these calls -> the score if the others are answered as well as they can be.
    """

    words: str
    score: Callable[[Run], float]
    dense: float
    allowed: float
    scale: float = 1.0
    unit: str = ""
    answers: Record | None = None
    confidence: float = CONFIDENCE
    calls: Sequence[Feeds] = ()
    best_of: Callable[[Sequence[Sequence[Array]]], float] | None = None

    def trial_loss(self, run: Run) -> Loss:
        """``loss``, but a file that has lost too much after a quarter of the calls, or two or three, runs no more.

        That rejects no file that the whole score would accept: what later calls can add to a loss is never negative.
        """
        if self.best_of is None:
            return self.loss(run)
        found: list[Sequence[Array]] = []
        for end in sorted({math.ceil(len(self.calls) * k / 4) for k in range(1, 5)}):
            found += [run(call) for call in self.calls[len(found) : end]]
            best = self.best_of(found)
            if not self.accepts(best):
                return Loss(best, self.dense - best, is_whole=end == len(self.calls))
        answers = iter(found)
        return self.loss(lambda feeds: next(answers))

    def loss(self, run: Run) -> Loss:
        """What a file loses, by its runs."""
        settings = {"allowed": self.allowed, "confidence": self.confidence}
        return loss_of(self.score, run, self.dense, self.answers, **settings)

    def is_sure(self, loss: Loss) -> bool:
        """Whether no more than is allowed is lost on other inputs, with the judge's confidence.

        Where that cannot be told, a part of what is allowed has to be left.
        """
        if loss.most is None:
            return self.accepts(loss.score, MARGIN)
        return self.accepts(loss.score) and self.accepts(self.dense - loss.most)

    def sure(self, run: Run) -> float:
        """The score that a file keeps on other inputs, with the judge's confidence: what is compared with a floor."""
        loss = self.loss(run)
        if loss.most is None:
            return self.dense - loss.lost / (MARGIN if loss.lost > 0 else 1.0)
        return self.dense - loss.most

    def accepts(self, score: float, share: float = 1.0) -> bool:
        """Whether a file of this score has lost no more than a share of what is allowed.

        Rounding of the last bit is no loss.
        """
        return math.isfinite(score) and self.dense - score <= share * self.allowed + 1e-9 * max(1.0, abs(self.dense))

    def chance(self, loss: Loss) -> tuple[str, ...]:
        """What a loss that is allowed says of other inputs, in a sentence; nothing where more is lost."""
        sure, many = f"{self.confidence:.0%} confidence", f"{loss.samples} samples"
        if not self.accepts(loss.score):
            return ()
        if loss.most is None:
            return (
                "what other inputs lose cannot be told: the score does not call the model in a fixed order, or there "
                "is no room on the disk for the answers",
            )
        if not loss.is_even:
            lost, most, allowed = (self._size(one) for one in (loss.lost, loss.most, self.allowed))
            return (f"loss: {lost} on {many}, at most {most} on inputs like them ({sure}); {allowed} may be lost",)
        others = differing(loss.samples, self.confidence)
        said = f"none of {many} scores otherwise than dense, so at most {others:.1%} of inputs like them do ({sure})"
        share = self.allowed / (abs(self.dense) or 1.0)
        if others <= share or not 0 < share < 1:
            return (said,)
        return (f"{said}: {needed(share, self.confidence)} such samples would show that no more than {share:.2g} do",)

    def _size(self, loss: float) -> str:
        return f"{loss * self.scale:.3g}{self.unit}"

    def told_of(self, loss: Loss) -> str:
        """A loss and what is allowed, for people."""
        most = "" if loss.most is None else f", at most {self._size(loss.most)} on other inputs ({self.confidence:.0%})"
        allowed = self.told(self.dense - self.allowed)
        return f"{self.told(loss.score)}{most}, where {allowed} is allowed ({self.words})"

    def told(self, score: float) -> str:
        """A score as it is printed."""
        return f"{score * self.scale:.4g}{self.unit}"


def allowed_drop(text: str | float, dense: float) -> float:
    """``0.01``: in the score's own unit; ``0.5%``: a share of the dense score.

    Raises:
        ConfigError: another form, or below 0.
    """
    try:
        number = float(str(text).removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(f"--max-drop: {text!r} given; allowed: a number in the score's unit, or a share of it as 1%")
    return number / 100 * abs(dense) if str(text).endswith("%") else number


def judge_of(
    dense: Run,
    held: Samples,
    names: Sequence[str],
    *,
    evaluate: Callable[..., float] | None = None,
    loss: str | None = None,
    max_drop: str | float | None = None,
    confidence: float = CONFIDENCE,
) -> Judge:
    """The judge of files by ``evaluate``, by labels where the data have them, else by agreement with the dense file.

    Args:
        dense: runs the dense file.
        held: data that nothing is fitted to.
        names: of the file's outputs.
        evaluate: takes ``run``, which maps a dict name -> array to such a dict of outputs, and returns the score.
        loss: how outputs are compared: ``top1``, ``tokens`` or ``error``; by default what they look like.

    Raises:
        ConfigError: a score that is no number or not the same twice, or a loss that does not fit the outputs.
        DataError: the dense file gives NaN or Inf on the data.
    """
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"--confidence: {confidence:g} given; allowed: 0.5 to below 1")
    judge = _judge_of(dense, held, names, evaluate=evaluate, loss=loss, max_drop=max_drop)
    again, answers = recorded(judge.score, dense)
    if evaluate is not None and again != judge.dense:
        raise ConfigError(
            f"--eval: the dense model scores {judge.dense:.6g}, then {again:.6g}; allowed: the same every time"
        )
    return replace(judge, answers=answers, confidence=confidence)


def _judge_of(
    dense: Run,
    held: Samples,
    names: Sequence[str],
    *,
    evaluate: Callable[..., float] | None,
    loss: str | None,
    max_drop: str | float | None,
) -> Judge:
    outputs = [[np.asarray(one) for one in dense(call)] for call in held.calls]
    if not all(np.isfinite(one).all() for each in outputs for one in each if one.dtype.kind == "f"):
        raise DataError("--data: the dense model answers it with NaN or Inf; look at the data and their scale")
    if evaluate is not None:
        return _by_function(evaluate, dense, names, MAX_DROP if max_drop is None else max_drop)
    if held.labels:
        return _by_labels(held, outputs, MAX_DROP if max_drop is None else max_drop)
    kind, at = _kind_of(outputs, loss)
    usual = ERROR_DROP if kind == "error" else MAX_DROP
    score = AGREEMENTS[kind]
    wanted = [each if at is None else [each[at]] for each in outputs]

    def best_of(first: Sequence[Sequence[Array]]) -> float:
        found = [[np.asarray(one) for one in (each if at is None else [each[at]])] for each in first]
        return score([*found, *wanted[len(found) :]], wanted)

    words = f"{WORDS[kind]} the dense model's on {len(held)} held-out samples"
    allowed = allowed_drop(usual if max_drop is None else max_drop, 1.0)
    return Judge(words, _over(best_of, held.calls), 1.0, allowed, 100.0, " %", calls=held.calls, best_of=best_of)


def _over(score: Callable[[Sequence[Sequence[Array]]], float], calls: Sequence[Feeds]) -> Callable[[Run], float]:
    """A score of the outputs of all calls as a score of a file, by its runs."""
    return lambda run: score([run(call) for call in calls])


def _by_function(evaluate: Callable[..., float], dense: Run, names: Sequence[str], max_drop: str | float) -> Judge:
    def score(run: Run) -> float:
        def named(feeds: Feeds) -> dict[str, Array]:
            given = {name: np.asarray(one) for name, one in feeds.items()}
            return dict(zip(names, run(given), strict=True))

        try:
            found = evaluate(named)
            return float(found)
        except Exception as error:  # of the user's own code
            raise ConfigError(f"--eval: the function fails: {type(error).__name__}: {error}") from error

    first = score(dense)
    if not math.isfinite(first):
        raise ConfigError(f"--eval: the dense model's score is {first}; allowed: a number, higher is better")
    return Judge("score of --eval", score, first, allowed_drop(max_drop, first))


def _by_labels(held: Samples, outputs: Sequence[Sequence[Array]], max_drop: str | float) -> Judge:
    first = outputs[0]
    at = next((k for k, one in enumerate(first) if one.dtype.kind == "f" and one.ndim == 2 and one.shape[1] > 1), None)
    if at is None or any(label.ndim != 1 or label.dtype.kind not in "iu" for label in held.labels):
        raise ConfigError(
            "--labels: they are compared with the largest of an output (samples, classes), as whole numbers "
            "(samples,); for anything else give a score of your own with --eval file.py:function"
        )
    wanted, index = np.concatenate(held.labels), at

    def best_of(first: Sequence[Sequence[Array]]) -> float:
        found = np.concatenate([np.asarray(each[index]).argmax(1) for each in first])
        return float(np.concatenate([found == wanted[: len(found)], np.ones(len(wanted) - len(found), bool)]).mean())

    dense, words = best_of(outputs), f"accuracy on {len(held)} held-out samples"
    allowed = allowed_drop(max_drop, dense)
    return Judge(words, _over(best_of, held.calls), dense, allowed, 100.0, " %", calls=held.calls, best_of=best_of)


# -- agreement with the dense file -----------------------------------------------------------------------------


def _kind_of(outputs: Sequence[Sequence[Array]], loss: str | None) -> tuple[str, int | None]:
    """How outputs are compared, and which of them; None for all."""
    if loss not in (None, *AGREEMENTS):
        raise ConfigError(f"--loss: {loss!r} given; allowed: {' | '.join(AGREEMENTS)}")
    first = outputs[0]
    scores = [k for k, one in enumerate(first) if one.dtype.kind == "f" and one.ndim == 2 and one.shape[1] > 1]
    steps = [k for k, one in enumerate(first) if one.dtype.kind == "f" and one.ndim == 3 and one.shape[2] > 1]
    if loss == "top1" or (loss is None and len(first) == len(scores) == 1):
        if not scores:
            raise ConfigError("--loss top1: no output is (samples, classes); give --loss error")
        return "top1", scores[0]
    if loss == "tokens" or (loss is None and len(steps) == len(first) == 1 and _sums_to_one(first[steps[0]])):
        if not steps:
            raise ConfigError("--loss tokens: no output is (samples, steps, classes); give --loss error")
        return "tokens", steps[0]
    return "error", None


def _sums_to_one(array: Array) -> bool:
    """Whether the last axis holds probabilities, or their logarithms."""
    numbers = array.astype(np.float64)
    with np.errstate(over="ignore"):
        sums = (numbers if (numbers >= 0).all() else np.exp(np.minimum(numbers, 0))).sum(-1)
    return bool(np.abs(sums - 1).max() < 1e-2) and bool((numbers <= 1 + 1e-3).all())


def _top1(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> float:
    pairs = [(a[0].argmax(1), b[0].argmax(1)) for a, b in zip(found, wanted, strict=True)]
    return float(np.concatenate([a == b for a, b in pairs]).mean())


def _tokens(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> float:
    """1 - token error: edit distance of the read sequences over their length.

    A token of more than a third of all steps is taken for a blank, as in connectionist temporal classification: then
    equal neighbours are one token, and blanks none, so that a shift by a step is no error.
    """
    ours, theirs = ([row for one in each for row in one[0].argmax(-1)] for each in (found, wanted))
    tokens, counts = np.unique(np.concatenate(theirs), return_counts=True)
    blank = int(tokens[counts.argmax()]) if counts.max() > counts.sum() / 3 else None
    pairs = [(_read(a, blank), _read(b, blank)) for a, b in zip(ours, theirs, strict=True)]
    wrong, length = sum(_edits(a, b) for a, b in pairs), sum(len(b) for _, b in pairs)
    return 1.0 - wrong / max(1, length)


def _read(steps: NDArray[np.int64], blank: int | None) -> list[int]:
    if blank is None:
        return [int(n) for n in steps]
    return [int(n) for n, last in zip(steps, [blank, *steps[:-1]], strict=True) if n not in (last, blank)]


def _edits(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Levenshtein distance."""
    row = list(range(len(theirs) + 1))
    for i, a in enumerate(ours, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(theirs, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def _error(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> float:
    """1 - the largest relative error of an output: norm of the difference over that of its deviation from its mean."""
    return 1.0 - math.sqrt(max(squared_errors(found, wanted), default=0.0))


def squared_errors(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> list[float]:
    """Of each floating output over all calls: squared norm of the difference, over that of the deviation from the mean.

    Infinite where sizes differ or numbers are not finite.
    """
    errors = []
    for ours, theirs in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True):
        if theirs[0].dtype.kind != "f":
            continue
        if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
            return [math.inf]
        pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(ours, theirs, strict=True)]
        lost = sum(float(np.square(a - b).sum()) for a, b in pairs)
        count, total = sum(b.size for _, b in pairs), sum(float(b.sum()) for _, b in pairs)
        spread = sum(float(np.square(b - total / max(1, count)).sum()) for _, b in pairs)
        errors.append(lost / spread if spread > 0 else (math.inf if lost else 0.0))
    return [one if math.isfinite(one) else math.inf for one in errors]


AGREEMENTS: Mapping[str, Callable[[Sequence[Sequence[Array]], Sequence[Sequence[Array]]], float]] = {
    "top1": _top1,
    "tokens": _tokens,
    "error": _error,
}
WORDS = {"top1": "top-1 agrees with", "tokens": "tokens agree with", "error": "outputs are as near as this to"}


def softened(outputs: Sequence[Array]) -> list[Array]:
    """Outputs with logarithms in place of probabilities, which are all near 0 and 1 where a net is sure."""
    return [_logarithm(one) if one.ndim >= 2 and one.dtype.kind == "f" and one.size else one for one in outputs]


def _logarithm(array: Array) -> Array:
    numbers: Numbers = array.astype(np.float64)
    is_scores = bool((numbers >= 0).all()) and array.shape[-1] > 1 and _sums_to_one(array)
    return np.log(np.maximum(numbers, 1e-6)) if is_scores else array
