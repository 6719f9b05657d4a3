"""hodec export: write the compressed model of a run as a file for other programs."""

import argparse
from pathlib import Path

from hodec.cli import Answer
from hodec.errors import ConfigError
from hodec.io.atomic import check_place

HELP = "write the compressed model of a run as ONNX, PyTorch program or safetensors"
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN --to KIND [--fuse] [--verify] [-o FILE] [--force]."""
    parser.add_argument("run", help="folder of a finished run, with config.yaml and compressed.safetensors")
    parser.add_argument("--to", required=True, choices=tuple(ENDINGS), help="kind of file")
    parser.add_argument("--fuse", action="store_true", help="measure which form of each layer is fastest here")
    parser.add_argument("--verify", action="store_true", help="read the file again, run it and compare the outputs")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="of an ONNX file")
    parser.add_argument("--batch", type=int, default=1, help="images at a time that --fuse measures with; default 1")
    parser.add_argument("-o", "--output", help="file to write; by default RUN/compressed.* or RUN/fused.*")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(options: argparse.Namespace) -> Answer:
    """Write the file; says where, and how far its outputs are from the model's."""
    from hodec.experiment.run_model import model_of_run

    path = _output(options)
    made = model_of_run(options.run)
    report, model, example = "", made.model, made.example(options.batch)
    if options.fuse:
        from hodec.fusion.search import fuse

        model = fuse(model, example_input=example)
        report = f"{model.fuse_report}\n"
    if options.to == "safetensors":
        written = made.save(path, verify=options.verify)
    elif options.to == "pt2":
        from hodec.export.program import to_program

        written = to_program(model, path, example_input=example, verify=options.verify)
    else:
        from hodec.export.onnx import to_onnx

        written = to_onnx(model, path, example_input=example, verify=options.verify, precision=options.precision)
    value = {"path": str(written.path), "bytes": written.path.stat().st_size, "error": written.error}
    return Answer(f"{report}{written}", value | {"batches": list(written.batches), "nodes": dict(written.nodes)})


def _output(options: argparse.Namespace) -> Path:
    """Where to write; a file that is there already and options that do not go together are refused."""
    ending = ENDINGS[options.to]
    path = Path(options.output or Path(options.run, ("fused" if options.fuse else "exported") + ending))
    wrong = {
        f"--batch {options.batch} is below 1": options.batch < 1,
        f"--precision {options.precision} is for --to onnx; --to {options.to} is written in float32": (
            options.precision != "fp32" and options.to != "onnx"
        ),
        "--fuse goes with --to onnx and --to pt2, which hold the structure of the fused net; --to safetensors holds "
        "the factors, which hodec.load reads": options.fuse and options.to == "safetensors",
        f"{path}: with --to {options.to} the file ends in {ending}, not {path.suffix!r}": path.suffix != ending,
        f"{path} exists; --force replaces it, -o FILE writes another": path.is_file() and not options.force,
    }
    for message in (message for message, is_so in wrong.items() if is_so):
        raise ConfigError(message)
    if path.exists():
        check_place(path, ConfigError)
    return path
