"""hodec bench: two model files side by side: latency, outputs, size."""

import argparse

from hodec.cli import Answer
from hodec.cli.calibration import inputs_from
from hodec.cli.decompose import add_input_arguments

HELP = "compare two ONNX model files: latency ratio, worst output difference, size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FIRST SECOND."""
    parser.add_argument("first", metavar="FIRST", help="the model to compare with, e.g. the dense one")
    parser.add_argument("second", metavar="SECOND", help="the model to judge, e.g. the decomposed one")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure (default: 10)")
    parser.add_argument("--threads", type=int, default=1, help="of each operator in onnxruntime (default: 1)")
    add_input_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    """Measure both in turns; the ratio stands beside the interval that it lies in."""
    from hodec.onnx_graph.bench import bench_files

    how = inputs_from(options) | {"seconds": options.seconds, "threads": options.threads}
    found = bench_files(options.first, options.second, **how)
    return Answer(str(found), found.to_dict())
