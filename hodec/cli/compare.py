"""hodec compare: train several ways over the same seeds, each at its best rate, and say what tells them apart."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hodec.cli import Answer
from hodec.errors import HodecError, Use

HELP = "train several ways at equal steps over the same seeds, each at its best rate, and compare them in pairs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments: the file of the arms, where the runs go, and settings of all arms."""
    parser.add_argument("arms", help="file of the arms, such as experiments/short_protocol/arms.yaml")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of all arms, as of hodec train; after the file"
    )
    parser.add_argument("-o", "--output", default="comparison", help="folder of the runs and tables; it goes on there")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="run this arm alone; repeatable")


def run(options: argparse.Namespace) -> Answer:
    """Run what is missing; returns the table.

    Raises:
        HodecError: the file or a setting is wrong.
    """
    from hodec.experiment.arms.race import race
    from hodec.experiment.arms.spec import read_comparison
    from hodec.experiment.arms.table import json_of, text_of, write_tables
    from hodec.experiment.signals import stoppable

    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    root = Path(options.output)
    try:
        comparison = read_comparison(Path(options.arms), options.settings)
        with stoppable(), _without_plans():
            arms = race(comparison, root, only=options.only, report=lambda arms: write_tables(root, comparison, arms))
    except HodecError as error:  # in the words of this verb, whose settings are those of hodec train
        words = error.told(Use.in_hydra).replace("hydra.run.dir=PATH", "-o FOLDER")
        raise type(error)(words) from error
    return Answer(text_of(comparison, arms), json_of(comparison, arms))


@contextmanager
def _without_plans() -> Iterator[None]:
    """Keep the plan, the same in each run, out of the log."""
    log = logging.getLogger("hodec.experiment.phases")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
