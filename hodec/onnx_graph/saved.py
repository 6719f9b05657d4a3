"""What a search found out, kept between calls: a file for each model, data and methods."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hodec._version import __version__
from hodec.calibration.data import Samples
from hodec.cost.latency import cache_folder
from hodec.io.atomic import JsonObject, sha256, write_json
from hodec.onnx_graph.graph import OnnxGraph

log = logging.getLogger(__name__)

# Format of the files and kind of the search: raise it with either. What another format or version left is not read.
FORMAT = "hodec-search 2"


@dataclass
class Saved:
    """Tables and answers of searches.

    Attributes:
        path: where they are; None keeps them in memory only.
        layers: layer -> its table.
        answers: what was asked -> the share and the layers that went back to dense.
    """

    path: Path | None = None
    layers: JsonObject = field(default_factory=dict)
    answers: JsonObject = field(default_factory=dict)

    @classmethod
    def of(cls, graph: OnnxGraph, fit: Samples, methods: Sequence[str], folder: str | Path | None = None) -> "Saved":
        """What is known of a model, the data that it is fitted to, and methods.

        Args:
            folder: by default that of all tables, see ``HODEC_CACHE``.
        """
        digest = hashlib.sha256(repr((FORMAT, __version__, list(methods))).encode())
        for file in (graph.path, *graph.data_files):
            digest.update(sha256(file).encode())
        for call in fit.calls:
            for name, array in call.items():
                digest.update(repr((name, array.dtype.str, array.shape)).encode())
                digest.update(array.tobytes())
        path = (cache_folder() if folder is None else Path(folder)) / f"search-{digest.hexdigest()[:24]}.json"
        try:
            found: Mapping[str, JsonObject] = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, dict(found["layers"]), dict(found["answers"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path)

    def write(self) -> None:
        """Write what is known; a folder that cannot be written is warned of."""
        if self.path is None:
            return
        try:
            write_json(self.path, {"format": FORMAT, "layers": self.layers, "answers": self.answers})
        except OSError as error:
            log.warning("%s cannot be written (%s): the next search starts anew; set HODEC_CACHE", self.path, error)
            self.path = None
