"""ONNX Runtime as every module here opens it: on the CPU, quietly."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hodec.errors import ConvertError

Array = NDArray[np.generic]


class NamedInput(Protocol):
    """An input of a session."""

    name: str


class Session(Protocol):
    """What is used of ``onnxruntime.InferenceSession``; an output is an array, or a list or mapping of arrays."""

    def run(self, output_names: None, input_feed: Mapping[str, Array], /) -> list[object]: ...

    def get_inputs(self) -> list[NamedInput]: ...


def open_session(
    model: bytes | Path, *, threads: int = 1, folder: Path | None = None, optimize: bool = True
) -> Session:
    """An onnxruntime session on the CPU; errors are raised, nothing is logged.

    Args:
        model: the bytes of a model, or its file.
        threads: threads of each operator.
        folder: where a model given as bytes keeps its tensors.
        optimize: as in deployment; without it the graph runs as it is written.

    Raises:
        ConvertError: onnxruntime is not installed.
        Exception: the model does not load; onnxruntime's own kinds of errors are not public.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ConvertError("onnxruntime is not installed: pip install 'hodec[export]'") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # fatal errors only
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session: Session = ort.InferenceSession(
        str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
    )
    return session


@contextmanager
def quiet(logger: str = "", level: int = logging.ERROR) -> Iterator[None]:
    """Hide Python warnings and what ``logger`` and those below it say under ``level``: libraries speak of their own
    insides, and what concerns a user becomes an error here."""
    log = logging.getLogger(logger)
    before = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(level)
        try:
            yield
        finally:
            log.setLevel(before)
