"""hodec report: write the report of a run, or of a sweep."""

import argparse
from pathlib import Path

from hodec.cli import Answer

HELP = "write the report of a run folder or of a sweep's folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's one argument, a folder."""
    parser.add_argument("path", help="folder of a run, or one that holds several")


def run(options: argparse.Namespace) -> Answer:
    """Write the report and return where it is."""
    from hodec.experiment.report.render import write_report, write_sweep

    folder = Path(options.path)
    written = write_report(folder) if (folder / "config.yaml").exists() else write_sweep(folder)
    return Answer(str(written), {"report": str(written)})
