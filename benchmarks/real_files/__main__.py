"""``python -m benchmarks.real_files``: makes the files, measures them, prints the table and keeps the rows."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import facts
from benchmarks.real_files import __doc__ as about
from benchmarks.real_files.case import Case
from benchmarks.real_files.cases import all_cases
from benchmarks.real_files.fetch import DEFAULT_CACHE, NotThere
from benchmarks.real_files.measure import Row, measured
from benchmarks.real_files.page import page, table
from benchmarks.real_files.ways import WAYS, made
from hodec.io.atomic import write_json, write_text

DENSE = "dense"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_files", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(all_cases()), help="some of the cases")
    parser.add_argument("--ways", nargs="+", metavar="NAME", default=list(WAYS), help=f"some of: {' | '.join(WAYS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/real_files"), help="default: outputs/real_files")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"of the packages; default: {DEFAULT_CACHE}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print and write; 2 for a name that there is not."""
    given = parser().parse_args(argv)
    cases = all_cases(given.cache)
    for name in (*given.only, *given.ways):
        if name not in cases and name not in WAYS:
            print(f"there is no {name!r}; there are {', '.join((*cases, *WAYS))}", file=sys.stderr)
            return 2
    for name in given.only:
        for row in rows_of(cases[name], given.ways, given.out):
            keep(row, given.out, cases)
    return 0


def rows_of(case: Case, ways: Sequence[str], out: Path) -> list[Row]:
    """The dense row and one for each way; one row with the reason where the case cannot run here."""
    try:
        rows = [_printed(measured(case, DENSE, case.path))]
        for way in ways:
            done = made(case, way, out / case.name.replace(" ", "_"))
            if done.path is None:
                rows.append(_printed(Row(case.name, way, seconds=done.seconds, said=done.said)))
            else:
                rows.append(_printed(measured(case, way, done.path, seconds=done.seconds, said=done.said)))
    except NotThere as reason:
        return [_printed(Row(case.name, DENSE, said=str(reason)))]
    return rows


def keep(row: Row, out: Path, cases: dict[str, Case]) -> None:
    """Put the row in the place of the last one of its kind, in ``rows.json`` and in ``real_files.md``."""
    store = out / "rows.json"
    held = json.loads(store.read_text())["rows"] if store.exists() else []
    rows = {(one["case"], one["way"]): Row(**one) for one in held}
    rows[row.case, row.way] = replace(row)
    order = {way: k for k, way in enumerate((DENSE, *WAYS))}
    kept = sorted(rows.values(), key=lambda one: (list(cases).index(one.case), order[one.way]))
    about_machine = facts(1)
    out.mkdir(parents=True, exist_ok=True)
    write_json(store, {"facts": about_machine, "rows": [one.to_dict() for one in kept]})
    write_text(out / "real_files.md", page(kept, cases, about_machine))


def _printed(row: Row) -> Row:
    print(table([row], head=False) + (f"  {row.said}" if row.score is None else ""), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
