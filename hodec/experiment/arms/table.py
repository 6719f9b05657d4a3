"""The tables of a comparison: accuracies with their spread, and differences in pairs with their intervals."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from scipy.stats import ttest_rel

from hodec.experiment.arms.race import Arm
from hodec.experiment.arms.spec import Comparison, epochs
from hodec.experiment.arms.trial import Trial
from hodec.experiment.data.options import Batches
from hodec.experiment.report.table import latex_table, markdown_table
from hodec.io.atomic import write_json, write_text
from hodec.text_table import csv_text, number


class Difference(NamedTuple):
    """The mean of paired differences, the ends of its confidence interval, and the probability under no difference."""

    mean: float
    low: float
    high: float
    p: float


def paired(values: Sequence[float], base: Sequence[float]) -> Difference | None:
    """The paired t test (Student, 1908) of ``values`` minus ``base``; None for fewer than two pairs or equal ones."""
    apart = [a - b for a, b in zip(values, base, strict=True)]
    if len(apart) < 2 or max(apart) == min(apart):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are equal up to rounding
        found = ttest_rel(values, base)
    low, high = found.confidence_interval()  # of 95 %, as is customary
    return Difference(mean(apart), float(low), float(high), float(found.pvalue))


def over_seeds(arm: Arm, base: Arm) -> Difference | None:
    """How an arm differs from the base in test accuracy, the seeds being the sample: would other seeds say so?"""
    ours, theirs = _in_pairs(arm, base)
    return paired([trial.test() for trial in ours], [trial.test() for trial in theirs])


def over_images(arm: Arm, base: Arm) -> Difference | None:
    """The same, the test images being the sample: would other images say so of these runs?

    Of each image the share of the seeds that have it right is compared; with one seed it is McNemar's comparison.
    """
    ours, theirs = _in_pairs(arm, base)
    if not ours:
        return None
    shares = [torch.stack([t.hits["compressed"] for t in trials]).double().mean(0) for trials in (ours, theirs)]
    return paired(shares[0].tolist(), shares[1].tolist())


def _in_pairs(arm: Arm, base: Arm) -> tuple[list[Trial], list[Trial]]:
    """The tested runs of both at the same seeds."""
    theirs = {trial.seed: trial for trial in base.runs if trial.hits}
    ours = [trial for trial in arm.runs if trial.hits and trial.seed in theirs]
    return ours, [theirs[trial.seed] for trial in ours]


HEADS = ("arm", "chosen", "tried, validation %", "as converted, %", "end, %", "by seed, %", "paired difference, points",
         "interval over seeds", "over images", "s a run")  # fmt: skip


def cells(comparison: Comparison, arms: Mapping[str, Arm], *, plus_minus: str = "±") -> list[list[str]]:
    """A row for each arm under HEADS."""
    base = arms.get(comparison.base)
    return [_row(name, arm, None if arm is base else base, plus_minus) for name, arm in arms.items()]


def _row(name: str, arm: Arm, base: Arm | None, plus_minus: str) -> list[str]:
    runs = [trial for trial in arm.runs if trial.hits]
    ends = [trial.test() for trial in runs]
    spread = f" {plus_minus} {_percent(stdev(ends))}" if len(ends) > 1 else ""
    of_all = f" ({len(runs)} of {len(arm.runs)})" if len(runs) < len(arm.runs) else ""
    seeds, images = (over_seeds(arm, base), over_images(arm, base)) if base else (None, None)
    middle = seeds or images
    return [
        name,
        " ".join(map(_short, arm.chosen.chosen)) or "-",
        " / ".join(f"{_value(one)} {_percent(one.validation)}" for one in arm.tried) if arm.chosen.chosen else "-",
        _percent(mean(trial.test("truncated") for trial in runs)) if runs else "-",
        f"{_percent(mean(ends))}{spread}{of_all}" if runs else "-",
        " / ".join(_percent(trial.test() if trial.hits else math.nan) for trial in arm.runs) or "-",
        number(middle.mean, "+.2f", scale=100) if middle else "-",
        _interval(seeds),
        _interval(images),
        number(mean(trial.seconds for trial in runs), ".0f") if runs else "-",
    ]


def _short(override: str) -> str:
    """``factor_lr 0.008`` of ``optimizer.factor_lr=0.008``."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]} {value}"


def _value(trial: Trial) -> str:
    return ", ".join(one.partition("=")[2] for one in trial.candidate.chosen)


def _percent(fraction: float) -> str:
    return number(fraction, ".2f", scale=100) if math.isfinite(fraction) else "broke down"


def _interval(found: Difference | None) -> str:
    return f"{number(found.low, '+.2f', scale=100)} to {number(found.high, '+.2f', scale=100)}" if found else "-"


def note(comparison: Comparison, arms: Mapping[str, Arm]) -> str:
    """What the table is of, in prose."""
    candidate = next(iter(arms.values())).chosen
    data = candidate.config.data
    steps = f" of {data.epoch_batches} steps" if isinstance(data, Batches) and data.epoch_batches else ""
    images = f", in batches of {data.batch_size} images" if isinstance(data, Batches) else ""
    seeds = ", ".join(map(str, comparison.seeds))
    text = (
        f"Test accuracy of the small net after {epochs(candidate.config)} epochs{steps} in all{images}, "
        f"seeds {seeds}; ± is the standard deviation over them (n - 1). What was tried was chosen from on the "
        f"validation split, by seed {comparison.seeds[0]}; only what was chosen was tested. Differences are in points, "
        f"to {comparison.base!r} at the same seed; intervals are of 95% by the paired t test, once with "
        "the seeds as the sample and once with the test images."
    )
    edges = [name for name, arm in arms.items() if at_edge(arm)]
    words = (
        f" The best of what was tried is at the end of its range, and a better one may lie beyond: {', '.join(edges)}."
    )
    return text + words * bool(edges)


def at_edge(arm: Arm) -> bool:
    """Whether an arm has chosen the first or the last of three or more."""
    tried = [trial.candidate for trial in arm.tried]
    return len(tried) > 2 and arm.chosen in (tried[0], tried[-1])


def text_of(comparison: Comparison, arms: Mapping[str, Arm]) -> str:
    """The table as Markdown."""
    return f"{markdown_table(HEADS, cells(comparison, arms), left=3)}\n{note(comparison, arms)}\n"


def json_of(comparison: Comparison, arms: Mapping[str, Arm]) -> dict[str, object]:
    """A row a run, tested or not, and a difference an arm; accuracies are fractions of 1."""
    base, apart = arms.get(comparison.base), dict[str, object]()
    for name, arm in arms.items():
        if base is not None and arm is not base:
            found = {"seeds": over_seeds(arm, base), "images": over_images(arm, base)}
            apart[name] = {key: one and one._asdict() for key, one in found.items()}
    return {"base": comparison.base, "runs": rows(arms), "differences": apart}


def rows(arms: Mapping[str, Arm]) -> list[dict[str, object]]:
    """One run each: those that were tried and not chosen have no test accuracy."""
    found: list[dict[str, object]] = []
    for name, arm in arms.items():
        rejected = [trial for trial in arm.tried if trial.candidate is not arm.chosen]
        for trial in (*rejected, *arm.runs):
            test = {
                f"{net}_test_accuracy": trial.test(net) if trial.hits else None for net in ("truncated", "compressed")
            }
            valid = trial.validation if math.isfinite(trial.validation) else None
            settings = " ".join(trial.candidate.chosen)
            found.append({"arm": name, "settings": settings, "seed": trial.seed, "validation_accuracy": valid, **test,
                          "params_cut": trial.reduction.get("params"), "macs_cut": trial.reduction.get("macs"),
                          "seconds": trial.seconds})  # fmt: skip
    return found


def write_tables(root: Path, comparison: Comparison, arms: Mapping[str, Arm]) -> None:
    """Write ``comparison.md``, ``.tex``, ``.csv`` and ``.json`` into the folder of the comparison."""
    latex = latex_table(HEADS, cells(comparison, arms, plus_minus="\0"), left=3, note=note(comparison, arms))
    write_text(root / "comparison.md", text_of(comparison, arms))
    write_text(root / "comparison.tex", latex)
    write_json(root / "comparison.json", json_of(comparison, arms))
    content = rows(arms)
    write_text(root / "comparison.csv", csv_text(content, list(content[0])))
