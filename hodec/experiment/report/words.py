"""The sentences of a report: what came out, and what the ADMM verdict means for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

from hodec.admm.options import WEAK_PULL
from hodec.experiment.report import units
from hodec.experiment.report.rundata import PHASES, RunData

#: Above this share of the weights' norm, truncation is a cut rather than a rounding: the page says it in amber.
FAR = 0.1

#: The approximation error, with spaces that do not break.
ERROR = "‖W\u00a0−\u00a0Z‖\u00a0/\u00a0‖W‖"

CONVENTIONS = (
    "1 MAC is one multiply-add for one image; FLOPs = 2 x MACs. Size counts parameters at 4 bytes (fp32). "
    "Prefixes are decimal: k\u00a0=\u00a01000."
)


@dataclass(frozen=True)
class Status:
    """What ADMM did. ``tone`` is ``good``, ``warn``, ``bad`` or ``calm`` and only colours the page."""

    tone: str
    title: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """All sentences in one paragraph."""
        return " ".join(sentence for sentence in self.sentences if sentence)


def model_and_data(run: RunData) -> str:
    """``resnet20 on digits``; parts that the files do not name are left out."""
    model = _named(run, "model")
    data = run.outcome.data or _named(run, "data")
    return f"{model or 'network'} on {data}" if data else model or "network"


def _named(run: RunData, group: str) -> str:
    """Name of a config group: the text itself, its ``name``, or the last part of its ``_target_``."""
    value = run.config.get(group)
    if isinstance(value, dict):
        target = str(value.get("_target_") or "").rpartition(".")[2]
        return str(value.get("name") or target)
    return "" if value is None else str(value)


def headline(run: RunData) -> str:
    """The result in one sentence; for an unfinished run, how far it came and what its plan promises."""
    if not run.finished:
        promised = _cuts(run.planned_reduction("params"), run.planned_reduction("macs"))
        plan = f"; the plan promises {promised}" if promised else ""
        return f"{model_and_data(run)}: {progress(run)}{plan}"
    parts = [_cuts(run.reduction("params"), run.reduction("macs")), _accuracies(run)]
    return f"{model_and_data(run)}: {'; '.join(part for part in parts if part) or 'finished, no figures recorded'}"


def progress(run: RunData) -> str:
    """``finished``, or where an unfinished run stands."""
    if run.finished:
        return "finished"
    if run.problem:
        return f"failed: {run.problem}"
    if not run.epochs:
        return "unfinished, no epoch recorded yet"
    last = run.epochs[-1]
    done = last.epoch + 1
    return f"unfinished, {done} epoch{'s' * (done != 1)} into {PHASES.get(last.phase, last.phase)}"


def _cuts(params: float | None, macs: float | None) -> str:
    named = ((params, "parameters"), (macs, "MACs"))
    return ", ".join(_cut(value, what) for value, what in named if value is not None)


def _cut(value: float, what: str) -> str:
    return f"{100 * abs(value):.1f} % {'fewer' if value >= 0 else 'more'} {what}"


def _accuracies(run: RunData) -> str:
    dense, small = run.network(run.reference).accuracy, run.network("compressed").accuracy
    if dense is not None and small is not None:
        return f"test accuracy {units.accuracy(dense)} {run.reference} → {units.accuracy(small)} compressed"
    return f"test accuracy {units.accuracy(small)} compressed" if small is not None else ""


def facts(run: RunData) -> tuple[str, ...]:
    """Short facts for the line below the headline."""
    plan, spent = run.plan, run.outcome.seconds
    many = "s" * (len(plan.layers) != 1)
    known = (
        (run.outcome.images, _images(run.outcome.images)),
        (plan.method, f"method {plan.method}"),
        (plan.rule, f"ranks by rule {plan.rule}"),
        (plan.layers, f"{len(plan.layers)} layer{many} factorized, {len(plan.skipped)} left dense"),
        (run.outcome.seed, f"seed {run.outcome.seed}"),
        (spent, f"{units.duration(sum(spent.values()))} of computing"),
    )
    return tuple(text for given, text in known if given)


def _images(counts: Mapping[str, float]) -> str:
    """``images: 4,500 train, 5,000 validation, 10,000 test``; empty splits are left out."""
    return "images: " + ", ".join(f"{units.exact(number)} {split}" for split, number in counts.items() if number)


def verdict(run: RunData) -> Status:
    """What the status of ADMM means, in words, with the numbers that show it."""
    status = run.outcome.status
    if status in _VERDICTS:
        tone, title, meaning = _VERDICTS[status]
        residual = _last_residual(run)
        if status == "epochs ended" and residual is not None and residual > FAR:
            tone = "warn"
        evidence = ("", "") if status == "off" else (_residual_path(run), _pull_advice(run))
        return Status(tone, title, (meaning, *evidence, _truncation(run)))
    if status:
        return Status("calm", f"ADMM: {status}", (_residual_path(run), _truncation(run)))
    if not run.phase("admm"):
        none = "There is no ADMM status in metrics.json and no ADMM epoch in metrics.jsonl."
        return Status("calm", "No ADMM training recorded", (none, _truncation(run)))
    running = "The status is written when the run ends." if not run.finished else "The files give no status."
    return Status("calm", "No ADMM verdict yet", (running, _residual_path(run), _pull_advice(run)))


_VERDICTS = {
    "converged": (
        "good",
        "ADMM converged",
        "The weights came within the tolerance of the low-rank tensors, so cutting them to the planned ranks changes "
        "them no more than that.",
    ),
    "epochs ended": (
        "calm",
        "ADMM ran to the end of its epochs",
        "The residuals stayed above the tolerance, so truncation cuts off what still separates the weights from the "
        "low-rank tensors. More epochs (dense_epochs) or a stronger pull (admm.pull, or a constant admm.rho) bring "
        "them closer.",
    ),
    "diverged": (
        "bad",
        "ADMM diverged",
        "The residuals grew instead of shrinking: the numbers of this run do not show what the method can do.",
    ),
    "off": (
        "calm",
        "ADMM was off",
        "The trained weights were truncated directly and then retrained; this is the control that ADMM has to beat.",
    ),
}


def _last_residual(run: RunData) -> float | None:
    at_end = run.outcome.primal_residual
    return run.last("admm/primal_residual") if at_end is None else at_end


def _residual_path(run: RunData) -> str:
    seen = [row.values["admm/primal_residual"] for row in run.phase("admm") if "admm/primal_residual" in row.values]
    end = _last_residual(run)
    if end is None:
        return ""
    what = f"The approximation error {ERROR}"
    if len(seen) < 2:
        return f"{what} is {units.share(end)}."
    way = "fell" if end < seen[0] else "rose" if end > seen[0] else "went"
    return f"{what} {way} from {units.share(seen[0])} to {units.share(end)} in {len(seen)} epochs."


def _pull_advice(run: RunData) -> str:
    """What to change when ADMM was pulled too weakly, or diverged for another reason."""
    pulls = [row.values["admm/pull"] for row in run.phase("admm") if "admm/pull" in row.values]
    # the middle one: a schedule that ends at learning rate 0 takes every pull to 0 with it
    if pulls and median(pulls) < WEAK_PULL:
        return (
            f"The pull was {units.plain(median(pulls))} in the middle: below {WEAK_PULL} the weights do not follow Z "
            "between two updates and the dual variable winds up. Raise admm.rho, or let admm.rho=auto fit it to the "
            "learning rate."
        )
    if run.outcome.status == "diverged":
        return "Lower admm.rho or optimizer.lr, or let more steps pass between two updates (admm.update_every)."
    return ""


def _truncation(run: RunData) -> str:
    dense, cut, small = (run.network(name).accuracy for name in ("dense", "truncated", "compressed"))
    if cut is None:
        return ""
    before = f"from {units.accuracy(dense)} " if dense is not None else ""
    after = f"; retraining ended at {units.accuracy(small)}" if small is not None else ""
    return f"Truncation took the test accuracy {before}to {units.accuracy(cut)}{after}."


def sweep_headline(runs: Sequence[RunData]) -> str:
    """How many runs, of what, how many came through, and between which accuracies they lie."""
    finished = [run for run in runs if run.finished]
    subjects = list(dict.fromkeys(model_and_data(run) for run in runs if run.config))
    of = f" of {subjects[0]}" if len(subjects) == 1 else ""
    head = f"{len(runs)} run{'s' * (len(runs) != 1)}{of}, {len(finished)} finished"
    known = [(run.network("compressed").accuracy, run.label) for run in finished]
    scored = [(value, label) for value, label in known if value is not None and isfinite(value)]
    if not scored:
        return head
    low, high = min(scored), max(scored)
    ends = [f"{units.accuracy(value)} ({label})" for value, label in dict.fromkeys((low, high))]
    return f"{head}; compressed test accuracy {' to '.join(ends)}"


def best_run(runs: Sequence[RunData]) -> RunData | None:
    """The finished run with the highest compressed test accuracy, the first of equals; ``None`` without any."""
    scored = [(run.network("compressed").accuracy, run) for run in runs if run.finished]
    known = [(value, run) for value, run in scored if value is not None and isfinite(value)]
    return max(known, key=lambda pair: pair[0])[1] if known else None
