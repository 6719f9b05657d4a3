"""All benchmarks in one command and one table of ratios.

    python -m benchmarks [--only NAME ..] [--quick] [--threads 1] [--out FOLDER] [--compiled]

Writes benchmarks.json, benchmarks.md and plots to FOLDER. A whole run takes about half an hour on one thread.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import THREAD_VARIABLES

if TYPE_CHECKING:
    from benchmarks.rows import Row
    from benchmarks.settings import Settings

# name -> module; imported only when wanted, and after the threads are pinned
GROUPS = {
    "decompose": "benchmarks.decompose",
    "cp": "benchmarks.cp",
    "big": "benchmarks.big",
    "fit": "benchmarks.fit",
    "vbmf": "benchmarks.vbmf",
    "admm": "benchmarks.admm_cost",
    "training": "benchmarks.training",
    "factors": "benchmarks.factors",
    "inference": "benchmarks.fused",
    "layers": "benchmarks.fused_layers",
    "chain": "benchmarks.chain",
    "files": "benchmarks.files",
    "file_latency": "benchmarks.file_latency",
    "file_compress": "benchmarks.file_compress",
    "scaling": "benchmarks.scaling",
}
REFUSED = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: a smoke test")
    parser.add_argument("--threads", type=int, default=1, help="of each library (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="default: outputs/benchmarks")
    parser.add_argument("--compiled", action="store_true", help="inference by torch.compile too, which takes minutes")
    parser.add_argument("--channels", type=int, nargs="+", default=[], help="of the kernels to decompose")
    return parser


def pin_threads(count: int) -> None:
    """For this process, if torch and NumPy are not imported yet, and for its children."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print and write; 0 when it worked, 2 with one line on stderr for a request that cannot be."""
    given = parser().parse_args(argv)
    unknown = [name for name in given.only or [] if name not in GROUPS]
    if unknown or given.threads < 1:
        what = f"--only: there is no {', '.join(unknown)}; there are {', '.join(GROUPS)}"
        print(what if unknown else f"--threads: {given.threads} given; at least 1 is needed", file=sys.stderr)
        return REFUSED
    pin_threads(given.threads)
    names = [name for name in GROUPS if name in (given.only or GROUPS)]
    run(names, given)
    return 0


def run(names: Sequence[str], given: argparse.Namespace) -> None:
    """Measure the groups and write what came out."""
    import torch

    from benchmarks.machine import Gauge, facts, measure_ceilings
    from benchmarks.page import page, write
    from benchmarks.settings import Settings

    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    gauge, about = Gauge(), facts(given.threads)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    ceilings = measure_ceilings(quick=given.quick)
    print(f"ceilings: {ceilings}\n", flush=True)
    settings = Settings(ceilings, given.out, given.quick, given.compiled, tuple(given.channels))
    rows: list[Row] = []
    texts: dict[str, str] = {}
    plots: dict[str, str] = {}
    paths: tuple[Path, ...] = ()
    for name in names:
        module = import_module(GROUPS[name])
        texts[name], captions = (module.__doc__ or "").strip(), getattr(module, "PLOTS", {})
        rows += list(_printed(name, module, settings))
        plots |= {file: caption for file, caption in captions.items() if (given.out / file).exists()}
        head = {"facts": about, "ceilings": vars(ceilings), "others": gauge.others(), "quick": given.quick}
        told = {"facts": about, "ceilings": ceilings, "verdict": gauge.verdict(), "quick": given.quick}
        # after every group: a run that is stopped keeps what it has measured
        paths = write(given.out, rows, page(rows, **told, plots=plots, texts=texts), head)
    print("\n".join([gauge.verdict(), *(f"written: {path}" for path in paths)]))


def _printed(name: str, module: Any, settings: "Settings") -> "Iterator[Row]":
    """The rows of a group, each printed as soon as it is there."""
    from benchmarks.page import line, table

    print(f"{name}\n{table([])}", flush=True)
    for row in module.rows(settings):
        print(line(row) + (f"  {row.note}" if row.figure is None else ""), flush=True)
        yield row
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
