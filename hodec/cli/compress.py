"""hodec compress: the smallest model file whose loss on held-out data is allowed."""

import argparse

from hodec.cli import Answer
from hodec.cli.calibration import add_data_options, calibration_from, progress_bar
from hodec.cli.decompose import add_input_arguments
from hodec.cli.rule_options import add_glob_options
from hodec.errors import ConfigError

HELP = "make an ONNX model file as small as an allowed loss on your data permits; no training"

TARGETS, STORES = ("latency", "macs", "size"), ("float32", "float16", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN --data D -o OUT, what may be lost, and what is to be won."""
    parser.add_argument("path", metavar="IN", help="model.onnx; it is only read")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the smaller model")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--report", metavar="PAGE.html", help="a page about it, in one file; replaced if it is there")
    add_data_options(parser)
    group = parser.add_argument_group("what may be lost, and what is won")
    group.add_argument("--eval", metavar="FILE.py:FUNCTION", help="run -> score, higher is better, on data of your own")
    group.add_argument(
        "--max-drop", metavar="DROP", help="in the score's own unit (0.01), or a share of it (1%%, the default)"
    )
    group.add_argument(
        "--target", default="latency", metavar="WHAT", help=f"{' | '.join(TARGETS)} (default: latency, on this machine)"
    )
    group.add_argument("--int8", action="store_true", help="quantize to 8 bits on top, within the same loss")
    group.add_argument(
        "--store", metavar="HOW", help=f"weights: {' | '.join(STORES)} (default: as short as keeps the score)"
    )
    group.add_argument(
        "--confidence", metavar="SHARE", help="that no more is lost on other inputs (default: 0.95), 0.5 to below 1"
    )
    group.add_argument("--methods", metavar="NAMES", help="that layers may take (default: spatial_svd,svd)")
    group.add_argument(
        "--round-to", metavar="N", help="ranks become multiples of this (default: 16, 4 for size; see docs/ranks.md)"
    )
    add_glob_options(group)
    add_input_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    """Search, write, and say what was won and lost."""
    methods = tuple(one.strip() for one in options.methods.strip("[]").split(",")) if options.methods else ()
    if not options.data:
        raise ConfigError("--data: missing; give .npz, .npy, a folder of such or of images, or file.py:function")
    round_to = _whole("--round-to", options.round_to) if options.round_to else None
    from hodec.methods import METHODS as KNOWN
    from hodec.onnx_graph.chance import CONFIDENCE
    from hodec.onnx_graph.compress import METHODS, compress_file
    from hodec.ranks.planning import PlanSettings
    from hodec.ranks.rule import Limits

    if unknown := [name for name in methods if name not in KNOWN]:
        raise ConfigError(f"--methods: {unknown[0]!r} given; allowed: {', '.join(KNOWN)}")
    confidence = CONFIDENCE if options.confidence is None else _share("--confidence", options.confidence)
    with progress_bar() as progress:
        result = compress_file(
            options.path, options.output, data=calibration_from(options), evaluate=options.eval, loss=options.loss,
            max_drop=options.max_drop, target=options.target, methods=methods or METHODS,
            options=PlanSettings(options.include, options.exclude), limits=Limits(round_to=round_to),
            int8=options.int8, store=options.store, confidence=confidence,
            report=options.report, force=options.force, progress=progress,
        )  # fmt: skip
    return Answer(str(result), result.to_dict())


def _whole(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{flag}: {text!r} given; allowed: a whole number from 1")
    return int(text)


def _share(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} given; allowed: a number from 0.5 to below 1") from None
