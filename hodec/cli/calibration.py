"""Flags of calibration data, and the bar that long searches show: what verbs that take --data share."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hodec.cli import value_of
from hodec.errors import ConfigError

if TYPE_CHECKING:
    from hodec.onnx_graph.compress import Calibration

ORDERS = ("rgb", "bgr")
LOSSES = ("top1", "tokens", "error")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """--data and how it is read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DATA",
        help=".npz or .npy (first axis: samples), a folder of such or of images, file.py:function",
    )
    group.add_argument("--labels", metavar="FILE.npy", help="whole numbers, one a sample: accuracy is what may drop")
    group.add_argument(
        "--loss", metavar="NAME", help=f"how outputs are compared where no score is: {' | '.join(LOSSES)}"
    )
    group.add_argument(
        "--mean", metavar="NUMBERS", help="of images' pixels, 0..255 (default: ImageNet's; 0 for one channel)"
    )
    group.add_argument(
        "--std", metavar="NUMBERS", help="what pixels less the mean are divided by (default: ImageNet's)"
    )
    group.add_argument("--channels", metavar="ORDER", help=f"of images: {' | '.join(ORDERS)} (default: {ORDERS[0]})")


def check_data_given(options: argparse.Namespace) -> None:
    """Refuse what says how data are read where there are none.

    Raises:
        ConfigError: naming the flag.
    """
    for flag in () if options.data else ("--labels", "--loss", "--mean", "--std", "--channels"):
        if value_of(options, flag) is not None:
            raise ConfigError(f"{flag}: given without data, of which it speaks; add --data DATA, or leave it out")


def calibration_from(options: argparse.Namespace) -> "Calibration":
    """The data that the options ask for.

    Raises:
        ConfigError: a flag of another form.
    """
    from hodec.calibration.images import Pixels
    from hodec.onnx_graph.compress import Calibration

    channels = options.channels or ORDERS[0]
    if channels not in ORDERS:
        raise ConfigError(f"--channels: {channels!r} given; allowed: {' | '.join(ORDERS)}")
    pixels = Pixels(_numbers("--mean", options.mean), _numbers("--std", options.std), channels)
    if 0 in pixels.std:
        raise ConfigError("--std: 0 given; allowed: numbers other than 0")
    return Calibration(options.data, options.labels, **inputs_from(options), pixels=pixels)


def inputs_from(options: argparse.Namespace) -> dict[str, Any]:
    """``shapes`` and ``values`` of a file's inputs, as ``--shape`` and ``--input`` give them."""
    from hodec.onnx_graph.feeds import parse_values
    from hodec.onnx_graph.sizes import parse_shapes

    return {"values": parse_values(options.input), "shapes": parse_shapes(options.shape)}


def _numbers(flag: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in (text or "").split(",") if one.strip())
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} given; allowed: numbers with commas between them") from None


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with the time left of what is being done; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def told(what: str, done: int, total: int) -> None:
            if bar.tasks[task].description != what:
                bar.reset(task, description=what)
            bar.update(task, completed=done, total=total)

        yield told
