"""docs/nets.md and docs/nets.json from what the slow test measured: ``python tests/nets/net_page.py``."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from net_list import NETS

from hodec.io.atomic import write_json, write_text

ROOT = Path(__file__).parents[2]
DOCS, MEASURED = ROOT / "docs", ROOT / "outputs" / "nets"

Row = dict[str, Any]

# A net counts as reached from this share of its multiply-adds in weights on.
REACHED = 0.95
# Gaps below this share of the multiply-adds in weights, and of the parameters, are not listed.
SMALL = 0.002

HEAD = """\
# Nets of other packages: what hodec sees, reaches and runs

Each net comes from its package's own code, at small sizes and with random weights, and goes through everything: a plan
by `svd` and one by `tt` at full rank (`allow_larger=True`) and `convert`; then at half of each layer's multiply-adds
(`Ratio(0.5)`, `tt`) a training step, `save` and `load`, `fuse`, `to_onnx` and `to_program`. A cell is what was
measured, or the number of a reason below, in hodec's own words.

```bash
pip install -e '.[dev]' {packages}
pytest -m slow -n 2 tests/nets
python tests/nets/net_page.py      # writes this page
```

Versions: {versions}.

- *in weights*: share of all multiply-adds that are products with a weight. The rest are products of two activations,
  as in attention. It is found by following what is computed from the input, apart from hodec's own count.
- *seen*: share of the multiply-adds in weights that the plan has, as planned or as skipped with a reason. Of the
  parameters every one is planned, skipped or counted among the others (norms, biases, tables), in each of these nets.
- *reached*: share that is factorized, by method.
- *equal*: relative error of the outputs at full rank, at most 1e-4 in float32 (or 1e-9 in float64 where a net magnifies
  rounding), while each weight is rebuilt within 1e-5. Each output holds numbers, none is empty or zero.
- *training step*: the loss before and after one step along the gradient, which is finite and reaches every factor.
- *save, load*: outputs of the net that was read, into one of other weights, are the same to the last bit.
- *fuse*, *ONNX*, *torch.export*: relative error of the outputs; files are run again, ONNX files in ONNX Runtime. The
  batch is free, where nothing else is said.
"""

GAPS = f"""\
By `tt`, where it is more than {SMALL:.1%} of the multiply-adds in weights or of the parameters."""


def file_name(net: str) -> str:
    return re.sub(r"\W+", "_", f"{NETS[net].group} {net}").strip("_").lower() + ".json"


def seen_share(row: Row) -> float:
    """Share of the multiply-adds in weights that stand in the plan."""
    return sum(row["seen"]["macs"].values())


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    versions = {key: value for row in rows for key, value in row["packages"].items()}
    packages = " ".join(sorted({"timm", "transformers", "diffusers", "monai"} & versions.keys()))
    head = HEAD.format(packages=packages, versions=", ".join(f"{k} {v}" for k, v in versions.items()))
    reasons: dict[str, int] = {}
    parts = [head, summary(rows), "## How much is seen and reached", coverage(rows), "## What works"]
    parts += [checks(rows, reasons)]
    if reasons:
        parts.append("\n".join(f"- [{number}] {reason.replace('<', '&lt;')}" for reason, number in reasons.items()))
    return "\n\n".join([*parts, "## What stays dense", GAPS, gap_table(rows)]).replace("\n\n\n", "\n\n") + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How far the goal is reached."""
    lines = []
    for method in rows[0]["reach"] if rows else ():
        short = [row["net"] for row in rows if row["reach"][method]["macs"] < REACHED]
        words, whole = f"; not on {', '.join(short)}" if short else "", len(rows)
        lines.append(
            f"- `{method}` reaches at least {REACHED:.0%} of the multiply-adds in weights on {whole - len(short)} of "
            f"{whole} nets ({1 - len(short) / whole:.0%}){words}."
        )
    return "\n".join(lines)


def coverage(rows: Sequence[Row]) -> str:
    """Sizes and shares, by package."""
    heads = [
        "net",
        "variant",
        "parameters",
        "MACs",
        "in weights",
        "seen",
        "svd: parameters",
        "MACs",
        "tt: parameters",
        "MACs",
    ]
    cells = [
        [
            row["net"], row["about"], short(row["params"]), short(row["macs"]),
            percent(row["seen"]["macs_in_weights"]["of all"]), percent(seen_share(row)),
            *(percent(row["reach"][method][key]) for method in ("svd", "tt") for key in ("params", "macs")),
        ]
        for row in rows
    ]  # fmt: skip
    return table(heads, cells)


def checks(rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """What each use of each net gave; reasons join ``reasons`` with a number."""
    names = list(rows[0]["checks"]) if rows else []

    def cell(given: dict[str, str]) -> str:
        told = [f"fault: {given['fault']}"] if "fault" in given else [given["reason"]] if "reason" in given else []
        notes = [f"[{reasons.setdefault(words, len(reasons) + 1)}]" for words in told]
        return " ".join([*([given["is"]] if "is" in given else []), *notes])

    return table(["net", *names], [[row["net"], *(cell(row["checks"][name]) for name in names)] for row in rows])


def gap_table(rows: Sequence[Row]) -> str:
    """The reasons for which layers stay dense, with their shares."""
    cells = [
        [row["net"], f"`{gap['first']}`" + (f" and {gap['layers'] - 1} more" if gap["layers"] > 1 else ""),
         percent(gap["params"]), percent(gap["macs"]), gap["reason"]]
        for row in rows
        for gap in merged(row["gaps"])
        if max(gap["params"], gap["macs"]) > SMALL
    ]  # fmt: skip
    return table(["net", "layers", "parameters", "MACs", "reason"], cells)


def merged(gaps: Sequence[Row]) -> list[Row]:
    """Gaps whose reasons differ in a number or in a layer's name only, added up under the reason of the first."""
    found: dict[str, Row] = {}
    for gap in gaps:
        kind = re.sub(r"\d+|shared with \S+", "", gap["reason"])
        one = found.setdefault(kind, {**gap, "layers": 0, "params": 0.0, "macs": 0.0})
        for key in ("layers", "params", "macs"):
            one[key] += gap[key]
    return list(found.values())


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{share:.1%}".replace("100.0%", "100%")


def short(number: int) -> str:
    return f"{number / 1e6:.3g} M"


def main() -> None:
    """Both files, from all rows that were measured; of nets that were not, the row that is there stays."""
    path = DOCS / "nets.json"
    rows = {row["net"]: row for row in (json.loads(path.read_text(encoding="utf-8")) if path.exists() else [])}
    for name in NETS:
        if (made := MEASURED / file_name(name)).exists():
            rows[name] = json.loads(made.read_text(encoding="utf-8"))
    kept = [rows[name] for name in NETS if name in rows]
    write_json(path, kept)
    write_text(DOCS / "nets.md", page(kept))


if __name__ == "__main__":
    main()
