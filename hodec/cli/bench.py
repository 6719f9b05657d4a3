"""hodec bench: two model files side by side: latency, outputs, size."""

import argparse

from hodec.cli import Answer
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
    from hodec.onnx_graph.feeds import parse_values
    from hodec.onnx_graph.sizes import parse_shapes

    found = bench_files(
        options.first,
        options.second,
        seconds=options.seconds,
        shapes=parse_shapes(options.shape),
        values=parse_values(options.input),
        threads=options.threads,
    )
    return Answer(str(found), found.to_dict())
