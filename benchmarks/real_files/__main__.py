"""``python -m benchmarks.real_files``: makes the files, measures them, prints the table and keeps the rows."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import facts
from benchmarks.real_files import __doc__ as about
from benchmarks.real_files.case import Case
from benchmarks.real_files.cases import all_cases
from benchmarks.real_files.fetch import DEFAULT_CACHE, NotThere
from benchmarks.real_files.measure import Row, measured
from benchmarks.real_files.page import page, table
from benchmarks.real_files.ways import WAYS, Made, made
from hodec.io.atomic import write_json, write_text

DENSE = "dense"
WORK = Path("outputs/real_files")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_files", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(all_cases()), help="some of the cases")
    parser.add_argument("--ways", nargs="+", metavar="NAME", default=list(WAYS), help=f"some of: {' | '.join(WAYS)}")
    parser.add_argument("--out", type=Path, default=WORK, help=f"of table and rows; default: {WORK}")
    parser.add_argument("--work", type=Path, default=WORK, help=f"of the models that are made; default: {WORK}")
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
        for row in rows_of(cases[name], given.ways, given.work):
            print(table([row], head=False) + (f"  {row.said}" if row.score is None else ""), flush=True)
            keep(row, given.out, cases)
    return 0


def rows_of(case: Case, ways: Sequence[str], work: Path) -> Iterator[Row]:
    """The dense row and one for each way; one row with the reason where the case cannot run here."""
    try:
        yield measured(case, DENSE, Made(None, 0.0, ""))
        for way in ways:
            done = made(case, way, work / case.name.replace(" ", "_"))
            if done.path is None:
                yield Row(case.name, way, seconds=done.seconds, said=done.said, load=os.getloadavg()[0])
            else:
                yield measured(case, way, done)
    except NotThere as reason:
        yield Row(case.name, DENSE, said=str(reason))


def keep(row: Row, out: Path, cases: dict[str, Case]) -> None:
    """Put the row in the place of the last one of its kind, in ``real_files.json`` and in ``real_files.md``."""
    store = out / "real_files.json"
    held = json.loads(store.read_text())["rows"] if store.exists() else []
    rows = {(one["case"], one["way"]): Row(**one) for one in held}
    rows[row.case, row.way] = row
    order = {way: k for k, way in enumerate((DENSE, *WAYS))}
    kept = sorted(rows.values(), key=lambda one: (list(cases).index(one.case), order[one.way]))
    about_machine = facts(1)
    out.mkdir(parents=True, exist_ok=True)
    write_json(store, {"facts": about_machine, "rows": [one.to_dict() for one in kept]})
    write_text(out / "real_files.md", page(kept, cases, about_machine))


if __name__ == "__main__":
    sys.exit(main())
