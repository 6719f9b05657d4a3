"""Reads what wandb wrote while it was offline: records of protocol buffers in a log of LevelDB's format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes, of the format; a record does not cross one, but may be continued in the next
HEADER = 7  # bytes: CRC-32 (4), length (2), kind (1): whole, first, middle or last part


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read(path: Path) -> dict[str, Any]:
    """``run``, ``history`` (rows in order), ``summary`` and the names of ``artifacts`` of one file."""
    found: dict[str, Any] = {"run": None, "history": [], "summary": {}, "artifacts": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
        elif kind == "history":
            found["history"].append(_items(record.history.item))
        elif kind == "summary":
            found["summary"] |= _items(record.summary.update)
        elif kind == "artifact":
            one = record.artifact
            found["artifacts"][one.type] = [entry.path for entry in one.manifest.contents]
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            one = record.request.log_artifact.artifact
            found["artifacts"][one.type] = [entry.path for entry in one.manifest.contents]
    return found


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
