"""The runs of a sweep as tables: one row a run for programs, one row a setting, over its seeds, for papers."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev

from hodec.experiment.report.rundata import RunData
from hodec.experiment.report.words import best_run, progress, sweep_state
from hodec.text_table import accuracy, csv_text

# Column of sweep.csv and key in sweep.json -> the number of a run; accuracies and cuts are fractions of 1.
NUMBERS: dict[str, Callable[[RunData], float | None]] = {
    "validation_accuracy": lambda run: run.network("compressed").validation_accuracy,
    "test_accuracy": lambda run: run.network("compressed").test_accuracy,
    "truncated_test_accuracy": lambda run: run.network("truncated").test_accuracy,
    "dense_test_accuracy": lambda run: run.network("dense").test_accuracy,
    "approximation_error": lambda run: run.primal_residual,
    "params": lambda run: run.network("compressed").params,
    "macs": lambda run: run.network("compressed").macs,
    "params_cut": lambda run: run.reduction("params"),
    "macs_cut": lambda run: run.reduction("macs"),
    "latency_ms": lambda run: run.network("compressed").latency_ms,
    "latency_ratio": lambda run: run.latency_ratio,
    "seconds": lambda run: sum(run.results.seconds.values()) or None,
}
# Of these, what a paper's table shows -> its heading there; all are in percent.
SHOWN = {
    "params_cut": "parameters cut",
    "macs_cut": "MACs cut",
    "truncated_test_accuracy": "truncated, test",
    "validation_accuracy": "validation",
    "test_accuracy": "test",
}


@dataclass(frozen=True)
class Group:
    """The finished runs that differ in nothing but the seed.

    Attributes:
        settings: those in which it differs from the other groups.
        runs: how many finished.
        seeds: how many seeds these had.
        means: column of ``NUMBERS`` -> the mean of the runs that have it.
        spreads: column -> standard deviation of a sample, for two runs or more.
    """

    settings: Mapping[str, str]
    runs: int
    seeds: int
    means: Mapping[str, float]
    spreads: Mapping[str, float]


def row(run: RunData) -> dict[str, object]:
    """One run: its folder, its swept settings, its state, its numbers and its error."""
    numbers = {
        name: value if (value := of(run)) is not None and isfinite(value) else None for name, of in NUMBERS.items()
    }
    state = "failed" if run.problem else progress(run)
    return {"run": run.folder.name, **run.settings, "state": state, **numbers, "error": run.problem or None}


def groups(runs: Sequence[RunData]) -> list[Group]:
    """The finished runs, those that differ in their seed alone put together, in the order of their first one."""
    together: dict[tuple[tuple[str, str], ...], list[RunData]] = {}
    for run in runs:
        if run.finished:
            key = tuple((name, value) for name, value in run.settings.items() if name != "seed")
            together.setdefault(key, []).append(run)
    return [_group(dict(key), members) for key, members in together.items()]


def _group(settings: Mapping[str, str], runs: Sequence[RunData]) -> Group:
    numbers = {name: [of(run) for run in runs] for name, of in NUMBERS.items()}
    columns = {name: [x for x in values if x is not None and isfinite(x)] for name, values in numbers.items()}
    return Group(
        settings,
        len(runs),
        len({run.settings.get("seed", run.results.seed) for run in runs}),
        {name: mean(values) for name, values in columns.items() if values},
        {name: stdev(values) for name, values in columns.items() if len(values) > 1},
    )


def best_group(found: Sequence[Group]) -> int | None:
    """Which group has the highest mean validation accuracy; None where none has one, or none has several seeds."""
    scores = {
        at: one.means["validation_accuracy"] for at, one in enumerate(found) if "validation_accuracy" in one.means
    }
    return max(scores, key=lambda at: scores[at]) if scores and any(one.runs > 1 for one in found) else None


def headline(runs: Sequence[RunData]) -> str:
    """How many runs, and the best by validation accuracy, with its test accuracy: a setting where seeds repeat it."""
    head, found, best = sweep_state(runs), groups(runs), best_run(runs)
    at = best_group(found)
    if at is not None:
        one = found[at]
        named = ", ".join(f"{key}={value}" for key, value in one.settings.items()) or "all settings alike"
        by, numbers = (
            f"mean validation accuracy over {one.runs} {'seeds' if one.seeds == one.runs else 'runs'}",
            one.means,
        )
    elif best is not None:
        named, by = best.label, "validation accuracy"
        numbers = {key: value for key in SHOWN if (value := NUMBERS[key](best)) is not None}
    else:
        return head
    test = accuracy(numbers.get("test_accuracy"))
    return f"{head}; best by {by}, {accuracy(numbers['validation_accuracy'])}: {named}, test accuracy {test}"


def to_csv(runs: Sequence[RunData]) -> str:
    """One line a run, under the keys of ``row``; what is unknown is empty."""
    rows = [row(run) for run in runs]
    fixed = ["state", *NUMBERS, "error"]
    settings = dict.fromkeys(key for one in rows for key in one if key not in ("run", *fixed))
    return csv_text(rows, ["run", *settings, *fixed])


def to_json(runs: Sequence[RunData]) -> str:
    """All runs, the groups, and what is best by validation accuracy (null without one): a run, and a group."""
    best, found = best_run(runs), groups(runs)
    at = best_group(found)
    content = {
        "best": best and best.folder.name,
        "best_settings": None if at is None else found[at].settings,
        "runs": [row(run) for run in runs],
        "groups": [
            {"settings": one.settings, "runs": one.runs, "mean": one.means, "std": one.spreads} for one in found
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def cells(runs: Sequence[RunData], *, plus_minus: str = "±") -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the paper's table: a group each, in percent, with the spread over its seeds."""
    found = groups(runs)
    keys = list(dict.fromkeys(key for one in found for key in one.settings))
    heads = [*(keys or ["settings"]), "runs", *(f"{title}, %" for title in SHOWN.values())]
    rows = []
    for one in found:
        named = [one.settings.get(key, "-") for key in keys] or ["all"]
        rows.append([*named, str(one.runs), *(_percent(one, name, plus_minus) for name in SHOWN)])
    return heads, rows


def _percent(group: Group, name: str, plus_minus: str) -> str:
    if name not in group.means:
        return "-"
    spread = f" {plus_minus} {100 * group.spreads[name]:.2f}" if name in group.spreads else ""
    return f"{100 * group.means[name]:.2f}{spread}"


def to_markdown(runs: Sequence[RunData]) -> str:
    """The paper's table, and below it why runs failed."""
    heads, rows = cells(runs)
    table = markdown_table(heads, rows, left=len(heads) - len(SHOWN) - 1)
    failed = "".join(f"- {_plain(run.label)}: {_plain(run.problem)}\n" for run in runs if run.problem)
    return f"{table}\n{NOTE}\n" + (f"\nFailed:\n\n{failed}" if failed else "")


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A table in Markdown, its first ``left`` columns set to the left and the others to the right."""
    lines = [heads, [":--" if at < left else "--:" for at in range(len(heads))], *rows]
    return "".join(f"| {' | '.join(_plain(cell) for cell in line)} |\n" for line in lines)


NOTE = (
    "Accuracies are those of the compressed network, but where it says truncated; ± is the standard deviation over "
    "the runs of a setting (n - 1), as a rule of several seeds. Settings are chosen by validation accuracy."
)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


# Signs that LaTeX acts on -> how it prints them; a zero byte is the plus-minus of ``cells``.
TEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "\0": r"$\pm$",
})  # fmt: skip


def to_latex(runs: Sequence[RunData]) -> str:
    r"""The paper's table as a ``tabular`` to ``\input``; it needs no package."""
    heads, rows = cells(runs, plus_minus="\0")
    return latex_table(heads, rows, left=len(heads) - len(SHOWN) - 1, note=NOTE)


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, note: str) -> str:
    r"""A ``tabular`` with ``note`` as its comment; ``left`` as in ``markdown_table``, a zero byte is its plus-minus."""
    lines = [" & ".join(cell.translate(TEX) for cell in line) + r" \\" for line in (heads, *rows)]
    columns = "l" * left + "r" * (len(heads) - left)
    body = "\n".join([r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"])
    return f"% {note.replace('±', '+-')}\n\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


TABLES = {"csv": to_csv, "json": to_json, "md": to_markdown, "tex": to_latex}
