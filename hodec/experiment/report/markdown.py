"""Markdown in small pieces, for the report that is read in a terminal or on a code host."""

import re

from hodec.experiment.report.tables import Row, Table


def text(raw: str) -> str:
    """Text with the signs escaped that Markdown or inline HTML would act on."""
    flat = " ".join(raw.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat)


def table(content: Table) -> str:
    """A pipe table; notes of rows follow it as a list."""
    titles = [text(title.strip()) for title, _ in content.columns]
    rules = ["--:" if numeric else ":--" for _, numeric in content.columns]
    lines = [_line(titles), _line(rules), *(_row(row) for row in content.rows + content.foot)]
    notes = [f"- {text(row.cells[0].text)}: {text(row.note)}" for row in content.rows if row.note]
    return "\n".join(lines + ([""] + notes if notes else []))


def fenced(raw: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", raw)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{raw.rstrip()}\n{fence}"


def _row(row: Row) -> str:
    mark = "**" if row.strong else ""
    return _line([f"{mark}{text(cell.text)}{mark}" if cell.text.strip() else "" for cell in row.cells])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
