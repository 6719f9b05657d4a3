"""hodec train: run the experiment; what follows the verb is read by Hydra, ``key=value`` and ``-m``."""

import argparse
import sys
from pathlib import Path

from hodec.cli import Answer

HELP = "train under ADMM, convert, retrain, report: all settings of an experiment; see hodec train --help"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Name what follows the verb; ``hodec.cli.main`` hands it to Hydra unread."""
    parser.add_argument("overrides", nargs="*", metavar="[group=option] [key=value]", help="settings")


def run(options: argparse.Namespace) -> Answer:
    """Run the experiment, or its sweep; it ends the program itself where something is wrong."""
    from hodec.experiment.main import main

    # Lightning starts the further processes of a run by this name.
    sys.argv = [str(Path(__file__).parents[1] / "experiment" / "__main__.py"), *options.overrides]
    main()
    return Answer("", None)
