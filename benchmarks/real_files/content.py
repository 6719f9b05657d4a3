"""Files made on the spot, and the net that tells their type from their bytes."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import sysconfig
import tarfile
import wave
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.real_files.case import Array, Feeds, SampleCase, share_right
from benchmarks.real_files.drawing import WORDS, phrase

EDGE, BLOCK, FILLER = 1024, 4096, 256  # bytes from each end, bytes they are looked for in, and the sign for none


@dataclass(frozen=True)
class FileTypes(SampleCase):
    """Magika: the share of files whose type is told."""

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, str]:
        kind = list(MADE)[rng.integers(len(MADE))]
        return {"bytes": ends_of(MADE[kind](rng))[None]}, kind

    def answer(self, outputs: Sequence[Array]) -> int:
        return int(outputs[0][0].argmax())

    def judge(self, told: list[tuple[Any, Any]]) -> float:
        held = json.loads((self.path.parent / "config.min.json").read_text())
        return share_right([(held["target_labels_space"][answer], truth) for answer, truth in told])


def ends_of(content: bytes) -> np.ndarray:
    """First and last 1024 bytes without the white space around, (2048,) int32, filled up in the middle."""
    first, last = content[:BLOCK].lstrip()[:EDGE], content[-BLOCK:].rstrip()[-EDGE:]
    filled = [*first, *[FILLER] * (EDGE - len(first)), *[FILLER] * (EDGE - len(last)), *last]
    return np.array(filled, dtype=np.int32)


@cache
def _sources(folder: str, pattern: str) -> tuple[Path, ...]:
    found = sorted(Path(sysconfig.get_path(folder)).glob(pattern))
    return tuple(path for path in found if path.stat().st_size > 1500)


def _source(rng: np.random.Generator, folder: str, pattern: str) -> bytes:
    files = _sources(folder, pattern)
    return files[rng.integers(len(files))].read_bytes()


def _lines(rng: np.random.Generator, count: int, line: Callable[[int], str]) -> bytes:
    return "\n".join(line(k) for k in range(int(rng.integers(count // 2, count)))).encode()


def _name(rng: np.random.Generator) -> str:
    return WORDS[rng.integers(len(WORDS))]


def _table(rng: np.random.Generator) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["id", *(_name(rng) for _ in range(4))])
    for k in range(int(rng.integers(20, 80))):
        rows.writerow([k, _name(rng), rng.integers(1000), round(float(rng.uniform(0, 100)), 2), phrase(rng, 2)])
    return text.getvalue().encode()


def _record(rng: np.random.Generator, depth: int = 0) -> Any:
    if depth == 3 or rng.random() < 0.4:
        return [_name(rng), int(rng.integers(10000)), round(float(rng.random()), 4), True][rng.integers(4)]
    return {_name(rng): _record(rng, depth + 1) for _ in range(int(rng.integers(2, 7)))}


def _json(rng: np.random.Generator) -> bytes:
    records = [{_name(rng): _record(rng) for _ in range(6)} for _ in range(int(rng.integers(3, 12)))]
    return json.dumps({"items": records, "total": len(records)}, indent=int(rng.integers(0, 5)) or None).encode()


def _html(rng: np.random.Generator) -> bytes:
    rows = "\n".join(f'<div class="{_name(rng)}"><p>{phrase(rng, 12)}</p></div>' for _ in range(20))
    head = f'<meta charset="utf-8"><title>{phrase(rng, 3)}</title><link rel="stylesheet" href="{_name(rng)}.css">'
    body = f"<h1>{phrase(rng, 4)}</h1>\n{rows}"
    return f"<!DOCTYPE html>\n<html>\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>".encode()


def _xml(rng: np.random.Generator) -> bytes:
    rows = "\n".join(f'  <item id="{k}"><name>{phrase(rng, 3)}</name><value>{k * 7}</value></item>' for k in range(40))
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{_name(rng)}s>\n{rows}\n</items>\n'.encode()


def _ini(rng: np.random.Generator) -> bytes:
    parts = [f"[{_name(rng)}]\n" + "\n".join(f"{_name(rng)} = {phrase(rng, 1)}" for _ in range(6)) for _ in range(8)]
    return "\n\n".join(parts).encode()


def _css(rng: np.random.Generator) -> bytes:
    return _lines(
        rng,
        60,
        lambda k: (
            f".{_name(rng)} {{\n  color: #{rng.integers(16**6):06x};\n  margin: {k}px auto;\n  display: flex;\n}}\n"
        ),
    )


def _sql(rng: np.random.Generator) -> bytes:
    table = _name(rng)
    head = f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, name VARCHAR(80) NOT NULL, amount DECIMAL(10, 2));\n"
    rows = lambda k: f"INSERT INTO {table} (id, name, amount) VALUES ({k}, '{_name(rng)}', {rng.uniform(0, 99):.2f});"  # noqa: E731
    return head.encode() + _lines(rng, 60, rows)


def _shell(rng: np.random.Generator) -> bytes:
    part = lambda k: f'if [ -f "/etc/{_name(rng)}" ]; then\n  echo "{phrase(rng, 3)}"\n  rm -f "$TMP/{k}"\nfi\n'  # noqa: E731
    return b"#!/bin/bash\nset -e\nTMP=$(mktemp -d)\n" + _lines(rng, 30, part)


def _image(kind: str) -> Callable[[np.random.Generator], bytes]:
    def made(rng: np.random.Generator) -> bytes:
        pixels = rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize(tuple(int(n) for n in rng.integers(40, 200, 2)))
        held = io.BytesIO()
        image.convert("P" if kind == "GIF" else "RGB").save(held, kind)
        return held.getvalue()

    return made


def _plain(rng: np.random.Generator) -> bytes:
    return _lines(rng, 60, lambda _: phrase(rng, int(rng.integers(5, 12))))


def _zip(rng: np.random.Generator) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for _ in range(int(rng.integers(1, 6))):
            archive.writestr(f"{_name(rng)}/{_name(rng)}{rng.integers(1000)}.txt", _plain(rng))
    return held.getvalue()


def _tar(rng: np.random.Generator) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for _ in range(int(rng.integers(1, 5))):
            content, entry = _plain(rng), tarfile.TarInfo(f"{_name(rng)}/{_name(rng)}.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return held.getvalue()


def _wave(rng: np.random.Generator) -> bytes:
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(int(rng.integers(1, 3)))
        file.setsampwidth(2)
        file.setframerate(int(rng.choice([8000, 16000, 22050, 44100])))
        file.writeframes((3000 * rng.standard_normal(8000)).astype(np.int16).tobytes())
    return held.getvalue()


def _array(rng: np.random.Generator) -> bytes:
    held = io.BytesIO()
    np.save(held, rng.standard_normal(tuple(rng.integers(8, 40, 2))).astype(rng.choice(["f4", "f8"])))
    return held.getvalue()


def _base(rng: np.random.Generator) -> bytes:
    base = sqlite3.connect(":memory:")
    base.execute(f'create table "{_name(rng)}" (id integer primary key, name text, amount real)')
    base.executemany(
        f'insert into "{base.execute("select name from sqlite_master").fetchone()[0]}" values (?, ?, ?)',
        [(k, phrase(rng, 3), float(rng.uniform(0, 99))) for k in range(int(rng.integers(5, 60)))],
    )
    return base.serialize()


MADE: dict[str, Callable[[np.random.Generator], bytes]] = {
    "python": lambda rng: _source(rng, "stdlib", "*.py"),
    "c": lambda rng: _source(rng, "include", "**/*.h"),
    "csv": _table,
    "json": _json,
    "html": _html,
    "xml": _xml,
    "ini": _ini,
    "css": _css,
    "sql": _sql,
    "shell": _shell,
    "txt": _plain,
    "zip": _zip,
    "tar": _tar,
    "wav": _wave,
    "npy": _array,
    "sqlite": _base,
    "gzip": lambda rng: gzip.compress(_plain(rng)),
    "bzip": lambda rng: bz2.compress(_plain(rng)),
    "xz": lambda rng: lzma.compress(_plain(rng)),
    "pickle": lambda rng: pickle.dumps(_record(rng)) + pickle.dumps([_record(rng) for _ in range(30)]),
    "png": _image("PNG"),
    "jpeg": _image("JPEG"),
    "gif": _image("GIF"),
    "bmp": _image("BMP"),
    "tiff": _image("TIFF"),
    "webp": _image("WEBP"),
    "pdf": _image("PDF"),
}
