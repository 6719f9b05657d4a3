"""Runs of model files in onnxruntime, one thread, quietly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from hodec.errors import ConvertError
from hodec.onnx_graph.model_file import ModelFile, first_line

# onnxruntime's word for "say nothing, errors are raised".
SILENT = 4
FOLDER_KEY = "session.model_external_initializers_file_folder_path"


class Cannot(Exception):
    """onnxruntime does not run a model; the text says why."""


def session(model: onnx.ModelProto | Path, *, folder: Path | None = None, optimize: bool = False) -> Any:
    """An onnxruntime session of one thread.

    Args:
        model: in memory, or a file.
        folder: where a model in memory keeps its tensors.
        optimize: as in deployment; without it the graph runs as it is written.

    Raises:
        Cannot: it does not load.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ConvertError("onnxruntime is not installed: pip install 'hodec[export]'") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = SILENT
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry(FOLDER_KEY, str(folder))
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its kinds of errors are not public
        raise Cannot(first_line(error)) from error


def run_session(opened: Any, feeds: Mapping[str, Any]) -> list[Any]:
    """All outputs of one run.

    Raises:
        Cannot: it does not run on these inputs.
    """
    try:
        outputs: list[Any] = opened.run(None, dict(feeds))
    except Exception as error:
        raise Cannot(first_line(error)) from error
    return outputs


def run_model(model: onnx.ModelProto | Path, feeds: Mapping[str, Any], *, folder: Path | None = None) -> list[Any]:
    """All outputs of one run of a model.

    Raises:
        Cannot: it does not load or run.
    """
    return run_session(session(model, folder=folder), feeds)


def run_by_definition(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    """All outputs of one run by ONNX's own definition of the operators: slow, and of every version.

    Raises:
        Cannot: it does not run.
    """
    try:
        return list(ReferenceEvaluator(model).run(None, dict(feeds)))
    except Exception as error:
        raise Cannot(first_line(error)) from error


def example_feeds(model: ModelFile, sizes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, Any]:
    """Seeded inputs of these sizes: standard normal numbers, and ones where a model takes whole numbers."""
    generator, feeds = np.random.default_rng(seed), {}
    for value in model.graph.input:
        if value.name not in sizes:
            continue
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        size = sizes[value.name]
        whole = np.dtype(kind).kind in "iub"
        feeds[value.name] = np.ones(size, kind) if whole else generator.standard_normal(size).astype(kind)
    return feeds
