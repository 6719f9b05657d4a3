"""The results as files: ``benchmarks.json`` for programs, ``benchmarks.md`` for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.machine import Ceilings
from benchmarks.rows import ALLOWED_ERROR, Row, in_unit
from hodec.io.atomic import write_json, write_text

HEADS = ("what", "peer", "ours", "peer's", "figure", "target", "met", "spread", "error, ours / peer's")

HOW = f"""\
Both sides of a line ran in one process, in turns, and each figure is a ratio of medians: a machine that slows down
slows both. Times are the thread's own CPU time where one thread works, so that what else runs on the core counts
little. Garbage is collected between samples only.

- *figure*: the peer's time over ours (x: greater is better), ours over the peer's (%: smaller is better), or what the
  line says.
- *spread*: half the interquartile range of the figure over the rounds, as a share of its median.
- *error*: our relative error over the peer's; for a target to count as met it must be at most {ALLOWED_ERROR} (1.0001
  for the distances of projections).
- *not measured*: the notes below the table say what is missing.

Peak memory is measured in a process of its own."""


def table(rows: Sequence[Row]) -> str:
    """A Markdown pipe table."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + ":--|:--|" + "--:|" * 4 + ":--|" + "--:|" * 2]
    return "\n".join([*lines, *(line(row) for row in rows)])


def line(row: Row) -> str:
    """One row of the table."""
    cells = [
        row.what,
        row.peer or "-",
        in_unit(row.ours, row.unit),
        in_unit(row.theirs, row.unit),
        row.figure_text,
        str(row.target or "-"),
        "not measured" if row.unmeasured else row.met,
        "-" if row.spread is None else f"±{row.spread:.0%}",
        "-" if row.error is None else f"{row.error:.4f}",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(
    rows: Sequence[Row],
    *,
    facts: Mapping[str, str],
    ceilings: Ceilings,
    verdict: str,
    plots: Mapping[str, str],
    quick: bool,
    texts: Mapping[str, str],
) -> str:
    """The whole page.

    Args:
        facts: of machine and versions.
        verdict: of the noise gauge.
        plots: file name -> caption.
        quick: whether sizes and rounds were those of a smoke test.
        texts: group -> what it measures.
    """
    judged = [row for row in rows if row.met in ("yes", "no")]
    missed = [row for row in judged if row.met == "no"]
    parts = ["# Benchmarks", f"{len(judged) - len(missed)} of {len(judged)} targets are met. {verdict}"]
    if quick:
        parts.append("**A quick run: small sizes, few rounds. It shows that all runs; its figures mean little.**")
    parts += ["## How it was measured", HOW, "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    parts.append(f"Measured ceilings of this machine: {ceilings}.")
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        parts += [f"## {group}", texts.get(group, ""), table(mine), notes(mine)]
        parts += [f"![{caption}]({name})" for name, caption in plots.items() if name.startswith(group)]
    if missed:
        parts += ["## Missed targets", "\n".join(f"- {explain(row)}" for row in missed)]
    return "\n\n".join(part for part in parts if part) + "\n"


def notes(rows: Sequence[Row]) -> str:
    """What limits each judged row and what else there is to say, as a list."""
    told = [(row, "; ".join(part for part in (row.limit, row.note) if part)) for row in rows]
    return "\n".join(f"- {row.what}{f' beside {row.peer}' if row.peer else ''}: {text}" for row, text in told if text)


def explain(row: Row) -> str:
    """One line on a missed target."""
    parts = [f"{row.what}{f' beside {row.peer}' if row.peer else ''}: {row.figure_text}, wanted {row.target}"]
    if row.error is not None and row.error > row.allowed_error:
        parts.append(f"the error is {row.error:.4f} times the peer's, allowed {row.allowed_error}")
    return "; ".join([*parts, *(part for part in (row.limit, row.note) if part)])


def write(folder: Path, rows: Sequence[Row], text: str, head: Mapping[str, object]) -> tuple[Path, Path]:
    """Both files, each whole or not at all; returns their paths."""
    paths = folder / "benchmarks.json", folder / "benchmarks.md"
    write_json(paths[0], {**head, "rows": [row.to_dict() for row in rows]})
    write_text(paths[1], text)
    return paths
