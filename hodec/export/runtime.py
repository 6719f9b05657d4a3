"""ONNX Runtime as every module here opens it: on the CPU, quietly."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hodec.errors import ConvertError, first_line
from hodec.inputs import ModelInput

Array = NDArray[np.generic]


class Cannot(ConvertError):
    """onnxruntime does not load or run a model; the text says why."""


class NamedInput(Protocol):
    """An input of a session."""

    name: str


class Session(Protocol):
    """What is used of ``onnxruntime.InferenceSession``; an output is an array, or a list or mapping of arrays."""

    def run(self, output_names: None, input_feed: Mapping[str, Array], /) -> list[object]: ...

    def get_inputs(self) -> list[NamedInput]: ...

    def end_profiling(self) -> str: ...


def open_session(
    model: bytes | Path,
    *,
    threads: int = 1,
    folder: Path | None = None,
    optimize: bool = True,
    profile: Path | None = None,
) -> Session:
    """An onnxruntime session on the CPU; errors are raised, nothing is logged.

    Args:
        model: the bytes of a model, or its file.
        threads: threads of each operator.
        folder: where a model given as bytes keeps its tensors.
        optimize: as in deployment; without it the graph runs as it is written.
        profile: what the file with the times of each kernel is to begin with; it is written by ``end_profiling``.

    Raises:
        ConvertError: onnxruntime is not installed.
        Cannot: the model does not load.
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
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    content = str(model) if isinstance(model, Path) else model
    try:
        session: Session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its kinds of errors are not public
        raise Cannot(first_line(error)) from error
    return session


def session(content: bytes, threads: int | None = None) -> Callable[..., list[Tensor]]:
    """An ONNX file as a function of tensors, on the CPU.

    Args:
        content: the file's bytes.
        threads: by default as many as torch uses.
    """
    opened = open_session(content, threads=threads or torch.get_num_threads())
    names = [one.name for one in opened.get_inputs()]

    def run(*args: object, **kwargs: object) -> list[Tensor]:
        outputs = opened.run(None, arrays(names, ModelInput(args, kwargs).tensors))
        return [torch.from_numpy(output) for output in outputs]

    return run


def arrays(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Array]:
    """The first tensors as arrays, by the names of a file's inputs."""
    return {name: x.detach().cpu().numpy() for name, x in zip(names, tensors)}


class Calls:
    """Calibration data as onnxruntime's quantizers read them: the arrays of one call at a time, None at the end."""

    def __init__(self, feeds: Iterable[Mapping[str, Array]]) -> None:
        self.left = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        """The next call."""
        return next((dict(each) for each in self.left), None)


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
