"""hodec report: write the report of a run, of a sweep, or of several runs beside each other."""

import argparse
from pathlib import Path

from hodec.cli import Answer

HELP = "write the report of a run folder, of a sweep's folder, or of several runs beside each other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments: folders, and where the comparison of several goes."""
    parser.add_argument(
        "path", nargs="+", help="folder of a run, or one that holds several; several: they are compared"
    )
    parser.add_argument("-o", "--output", default="comparison", help="folder for the comparison of several")


def run(options: argparse.Namespace) -> Answer:
    """Write the report and return where it is."""
    from hodec.experiment.report.render import write_comparison, write_report, write_sweep

    folder = Path(options.path[0])
    if len(options.path) > 1:
        written = write_comparison(options.path, options.output)
    else:
        written = write_report(folder) if (folder / "config.yaml").exists() else write_sweep(folder)
    return Answer(str(written), {"report": str(written)})
