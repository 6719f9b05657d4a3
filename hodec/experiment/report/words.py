"""Headlines, states and verdicts of a report; its longer sentences are in the templates."""

from collections.abc import Mapping, Sequence
from math import isfinite

from scipy.stats import binomtest

from hodec.experiment.report.rundata import PHASES, RunData
from hodec.text_table import accuracy, number

#: The approximation error, with spaces that do not break.
ERROR = "‖W\u00a0−\u00a0Z‖\u00a0/\u00a0‖W‖"

_VERDICTS = {
    "converged": ("good", "ADMM converged"),
    "diverged": ("bad", "ADMM diverged"),
    "off": ("calm", "ADMM was off"),
}


def verdict(run: RunData, *, far: float = 0.1, tolerated_loss: float = 0.01) -> tuple[str, str]:
    """What ADMM did: a tone, ``good``, ``warn``, ``bad`` or ``calm``, which only colours the page, and a title.

    Args:
        far: fraction of the weights' norm above which truncation is a cut rather than a rounding.
        tolerated_loss: loss of test accuracy against the dense network that still counts as none, a fraction.
    """
    status, residual = run.results.status, run.primal_residual
    if status == "epochs ended":  # the result says whether the epochs were enough
        dense, compressed = run.network(run.reference).test_accuracy, run.network("compressed").test_accuracy
        kept = dense is not None and compressed is not None and dense - compressed <= tolerated_loss
        too_far = residual is not None and residual > far
        return "good" if kept else "warn" if too_far else "calm", "ADMM ran to the end of its epochs"
    if status:
        return _VERDICTS.get(status, ("calm", f"ADMM: {status}"))
    return "calm", "No ADMM verdict yet" if run.phase("admm") else "No ADMM training recorded"


def outcome(run: RunData, *, unlikely: float = 0.05) -> tuple[str, str, str]:
    """What the compressed network lost or won against the dense one: a tone, a title and a sentence, or three times "".

    Args:
        unlikely: probability below which a difference is not put down to chance.
    """
    before, after = run.network(run.reference).test_accuracy, run.network("compressed").test_accuracy
    images = int(run.results.images.get("test", 0))
    if before is None or after is None or not isfinite(before + after):
        return "", "", ""
    points = f"{number(abs(after - before), '.2f', scale=100)} points"
    sure, text = True, ""
    if images:
        low, high = interval(after, images)
        text = f"{accuracy(after)} on {images:,} test images, 95 % interval {accuracy(low)} to {accuracy(high)}."
    if counts := run.results.against.get(run.reference):
        lost, won = int(counts["lost"]), int(counts["won"])
        likely = by_chance(lost, won)
        sure = likely < unlikely
        words = "is more than chance" if sure else "may be chance"
        test = f": the difference {words} (McNemar's exact test, p = {likely:.2g})" if lost + won else ""
        text += f" It has {won} right that the {run.reference} network has wrong, and {lost} the other way round{test}."
    if after == before:
        return "good", "No accuracy lost", text.strip()
    if after > before:
        return ("good" if sure else "calm"), f"{points} won", text.strip()
    return ("warn" if sure else "calm"), f"{points} lost", text.strip()


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, a fraction, that was measured on ``images`` images (Wilson, 1927)."""
    found = binomtest(round(accuracy * images), images).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def by_chance(lost: int, won: int) -> float:
    """The probability that two equally good networks differ on so many images as unevenly as these, or more so.

    McNemar's exact test (1947; Edwards, 1948): of the images that one of them alone has right, each is on either side
    with probability 1/2.

    Args:
        lost: images that the first network alone has right.
        won: images that the second one alone has right.
    """
    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


def retraining(run: RunData) -> str:
    """The rate of retraining, where it came from, and what is level with it; empty where the files do not say."""
    lr, probes = (run.results.retraining.get(key) for key in ("lr", "probes"))
    if lr is None:
        return ""
    source = f"found by {number(probes)} short descents" if probes else "as the settings give it"
    end = run.results.retraining_end
    beyond = f": the {end} of those tried, so that a better one may lie beyond" if end else ""
    level = run.results.retraining.get("level")
    alike = f"; {number(level)} of the others ended level with it" if level else ""
    return f"The rate of retraining was {number(lr)}, {source}{beyond}{alike}."


def model_and_data(run: RunData) -> str:
    """``resnet20 on digits``; parts that the files do not name are left out."""
    model, data = _named(run, "model") or "network", run.results.data or _named(run, "data")
    return f"{model} on {data}" if data else model


def _named(run: RunData, group: str) -> str:
    """Name of a config group: the text itself, its ``name``, or the last part of its ``_target_``."""
    value = run.config.get(group)
    if isinstance(value, dict):
        return str(value.get("name") or str(value.get("_target_") or "").rpartition(".")[2])
    return "" if value is None else str(value)


def headline(run: RunData) -> str:
    """The result in one sentence; for an unfinished run, its last epoch and the reduction that its plan promises."""
    if not run.finished:
        planned = f"; the plan promises {_cuts(run.plan.reduction)}" if run.plan else ""
        return f"{model_and_data(run)}: {progress(run)}{planned}"
    gains = [_cuts({cost: run.reduction(cost) for cost in ("params", "macs")}), _latency(run)]
    parts = [", ".join(filter(None, gains)), _accuracies(run)]
    return f"{model_and_data(run)}: {'; '.join(filter(None, parts)) or 'finished, no results recorded'}"


def progress(run: RunData) -> str:
    """``finished``, or where an unfinished run stands."""
    if run.finished:
        return "finished"
    if run.problem:
        return f"failed: {run.problem}"
    if not run.epochs:
        return "unfinished, no epoch recorded yet"
    last = run.epochs[-1]
    return f"unfinished, {_counted(last.epoch + 1, 'epoch')} into {PHASES.get(last.phase, last.phase)}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _cuts(reduction: Mapping[str, float | None]) -> str:
    named = ((reduction[cost], name) for cost, name in (("params", "parameters"), ("macs", "MACs")))
    return ", ".join(
        f"{number(abs(value), '.1f', scale=100)} % {'fewer' if value >= 0 else 'more'} {name}"
        for value, name in named
        if value is not None
    )


def _latency(run: RunData) -> str:
    ratio = run.latency_ratio
    if ratio is None or number(max(ratio, 1 / ratio)) == "1":
        return ""
    return f"{number(max(ratio, 1 / ratio))} x {'lower' if ratio >= 1 else 'higher'} latency"


def _accuracies(run: RunData) -> str:
    dense, compressed = run.network(run.reference).test_accuracy, run.network("compressed").test_accuracy
    if compressed is None:
        return ""
    before = "" if dense is None else f"{accuracy(dense)} {run.reference} → "
    return f"test accuracy {before}{accuracy(compressed)} compressed"


def sweep_state(runs: Sequence[RunData]) -> str:
    """How many runs, of what, how many finished."""
    subjects = list(dict.fromkeys(model_and_data(run) for run in runs if run.config))
    of = f" of {subjects[0]}" if len(subjects) == 1 else ""
    return f"{_counted(len(runs), 'run')}{of}, {sum(run.finished for run in runs)} finished"


def best_run(runs: Sequence[RunData]) -> RunData | None:
    """The finished run whose compressed network has the highest validation accuracy, the first of equals.

    ``None`` where no run has one: the test accuracy is not there to choose by.
    """
    scores = [(run.network("compressed").validation_accuracy, run) for run in runs if run.finished]
    known = [(score, run) for score, run in scores if score is not None and isfinite(score)]
    return max(known, key=lambda pair: pair[0])[1] if known else None
