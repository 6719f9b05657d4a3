"""Runs of models, and what their outputs are compared by."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from hodec.errors import first_line
from hodec.export.runtime import Array, Cannot, Session, open_session
from hodec.onnx_graph.graph import OnnxGraph


def run_session(session: Session, feeds: Mapping[str, Array]) -> list[object]:
    """All outputs of one run.

    Raises:
        Cannot: it does not run on these inputs.
    """
    try:
        return session.run(None, feeds)
    except Exception as error:
        raise Cannot(first_line(error)) from error


def run_model(model: onnx.ModelProto | Path, feeds: Mapping[str, Array], *, folder: Path | None = None) -> list[object]:
    """All outputs of one run of a model as it is written, on one thread.

    Raises:
        Cannot: it does not load or run.
    """
    content = model if isinstance(model, Path) else model.SerializeToString()
    return run_session(open_session(content, folder=folder, optimize=False), feeds)


def run_by_definition(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[object]:
    """All outputs of one run by ONNX's own definition of the operators: slow, and of every version.

    Raises:
        Cannot: it does not run.
    """
    try:
        return list(ReferenceEvaluator(model).run(None, dict(feeds)))
    except Exception as error:
        raise Cannot(first_line(error)) from error


def example_feeds(graph: OnnxGraph, sizes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, Array]:
    """Seeded inputs of these sizes: standard normal numbers, and ones where a model takes whole numbers."""
    generator, feeds = np.random.default_rng(seed), dict[str, Array]()
    for name, value in graph.inputs.items():
        kind = (value.dtype or ir.DataType.FLOAT).numpy()
        whole = kind.kind in "iub"
        feeds[name] = np.ones(sizes[name], kind) if whole else generator.standard_normal(sizes[name]).astype(kind)
    return feeds


def is_finite(value: object) -> bool:
    """Whether an output holds neither NaN nor Inf; outputs that are no numbers count as finite."""
    return not isinstance(value, np.ndarray) or value.dtype.kind != "f" or bool(np.isfinite(value).all())


def relative_difference(result: object, wanted: object) -> float:
    """Largest difference over the largest number of ``wanted``, or that difference where all of them are 0.

    Infinite where shapes differ; 0 for outputs that are no floating numbers.
    """
    if not isinstance(wanted, np.ndarray) or wanted.dtype.kind != "f":
        return 0.0
    if not isinstance(result, np.ndarray) or result.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    top = float(np.abs(wanted).max())
    difference = float(np.abs(result.astype(np.float64) - wanted).max())
    return difference / top if top else difference
