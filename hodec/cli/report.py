"""hodec report: write the report of a run, or of a sweep."""

import argparse
from pathlib import Path

from hodec.cli import Answer

HELP = "write the report of a run folder or of a sweep's folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FOLDER."""
    parser.add_argument("path", help="folder of a run, or one that holds several")


def run(options: argparse.Namespace) -> Answer:
    """Write the report; says where.

    Raises:
        HodecError: a folder without a finished run.
    """
    from hodec.experiment.report.render import write_report, write_sweep

    folder = Path(options.path)
    written = write_report(folder) if (folder / "config.yaml").exists() else write_sweep(folder)
    return Answer(str(written), {"report": str(written)})
