"""Hostile files: altered bytes, headers that lie, archives that unpack to multiples, other kinds of numbers."""

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save
from small_nets import SmallResNet

import hodec
from hodec.errors import HodecError
from hodec.models.weights import load_weights

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, True, None, "4", [], {}]


def altered(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, a piece cut out, doubled, overwritten, cut off, or put in the place of another."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        if not data:
            break
        # most of a file is numbers: what says how they are read is at its ends
        start = draw.choice(
            [
                draw.randrange(len(data)),
                draw.randrange(min(300, len(data))),
                max(0, len(data) - 1 - draw.randrange(300)),
            ]
        )
        length, kind = draw.choice([1, 2, 8, 40, 1000]), draw.randrange(7)
        piece = bytes(data[start : start + length])
        if kind == 0:
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[start : start + length]
        elif kind == 2:
            data[start:start] = piece * draw.choice([1, 3])
        elif kind == 3:
            del data[start:]
        elif kind == 4:
            data[start : start + length] = draw.randbytes(len(piece))
        elif kind == 5:
            data[start : start + length] = bytes(len(piece))
        else:
            at = draw.randrange(len(data))
            data[at : at + length] = piece
    return bytes(data)


@cache
def net() -> SmallResNet:
    """The net that the files are of."""
    torch.manual_seed(0)
    return SmallResNet().eval()


@cache
def safe() -> bytes:
    """Its weights as safetensors."""
    return save(net().state_dict())


@cache
def pickled(kind: str) -> bytes:
    """Its weights as torch.save writes them, as an archive or in the way before it."""
    buffer = io.BytesIO()
    torch.save(net().state_dict(), buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def same(model: torch.nn.Module) -> bool:
    """Whether a model has the numbers of ``net``."""
    mine = net().state_dict()
    return all(torch.equal(value, mine[key]) for key, value in model.state_dict().items())


def load(path: Path) -> str:
    """Weights read from a file: a refusal leaves the model as it was; numbers that are taken are finite."""
    torch.manual_seed(1)
    model = SmallResNet().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_weights(model, path)
    except HodecError:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        raise
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    return "read, as they were" if same(model) else "read, altered"


def header_edits(draw: random.Random) -> bytes:
    """A safetensors file whose header lies."""
    content = safe()
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    name = draw.choice(sorted(header))
    one, kind = header[name], draw.randrange(9)
    if kind == 0:
        one["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X", "", 3, None])
    elif kind == 1:
        one["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randint(0, 4))]
    elif kind == 2:
        one["data_offsets"] = [draw.choice(NUMBERS) for _ in range(draw.choice([2, 2, 1, 3]))]
    elif kind == 3:
        header[draw.choice(["x", "", "net.", "__metadata__", "conv1.weight"]) + draw.choice(["", name])] = header.pop(
            name
        )
    elif kind == 4:
        header["__metadata__"] = draw.choice([{"a": 1}, [], "x", {"a": "b" * 10**5}, None])
    elif kind == 5:
        one["shape"] = [*one["shape"], *[1] * draw.choice([1, 40, 2000])]
    elif kind == 6:
        header[name] = draw.choice(NUMBERS)
    elif kind == 7:
        header |= {f"x{k}": one for k in range(draw.choice([1, 3000]))}
    else:
        header = draw.choice([{}, [], [header], {"a": header}])
    text = json.dumps(header).encode()
    if draw.random() < 0.1:
        text = draw.choice([b"[" * 10**5, b'{"a":' * 10**4, b"\xff" * 50, b"", text + b" " * 1000])
    length = draw.choice([len(text)] * 8 + [0, 1, len(text) - 1, 2**31, 2**62, 2**64 - 1])
    return struct.pack("<Q", length) + text + content[8 + size :]


class Runs:
    """What runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def odd_tensor(draw: random.Random, like: torch.Tensor) -> Any:
    """Something else in the place of a tensor."""
    return draw.choice(
        [
            lambda: like.to(draw.choice(DTYPES)),
            lambda: like.float().clone().fill_(float("nan")),
            lambda: like.float().clone().fill_(float("inf")),
            lambda: like.reshape(-1),
            lambda: like.flatten()[:0],
            lambda: torch.empty(like.shape, device="meta"),
            lambda: torch.zeros(1, dtype=like.dtype).expand(2**33),
            lambda: torch.zeros((), dtype=like.dtype).expand(like.shape),
            lambda: like.to_sparse(),
            lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
            lambda: torch.nn.Parameter(like.float()),
            lambda: like.tolist(),
            lambda: None,
            lambda: {"a": like},
            lambda: "text",
        ]
    )()


def odd_weights(draw: random.Random, mark: Path) -> bytes:
    """A file of torch.save with something in it that is no plain weight."""
    state: dict[Any, Any] = dict(net().state_dict())
    for _ in range(draw.choice([1, 2])):
        name = draw.choice(sorted(map(str, state)))
        if name in state:
            state[name] = odd_tensor(draw, state[name]) if isinstance(state[name], torch.Tensor) else 3
    whole: Any = state
    act = draw.randrange(10)
    if act == 0:
        whole = {draw.choice(["state_dict", "model", "x", 3]): state}
    elif act == 1:
        whole = draw.choice([[], [state], 3, None, {}, {"model": {}}, {"model": {"model": state}}])
    elif act == 2:
        whole = {**state, draw.choice(["x", 3, "conv1.weight.x", ""]): draw.choice([torch.zeros(2), Runs(mark)])}
    elif act == 3:
        whole = {f"{draw.choice(['net', 'a.b', 'module'])}.{key}": value for key, value in state.items()}
    buffer = io.BytesIO()
    torch.save(whole, buffer, _use_new_zipfile_serialization=draw.random() < 0.8)
    return buffer.getvalue()


def repacked(draw: random.Random) -> bytes:
    """The archive of torch.save packed anew: parts that unpack to multiples, are absent, doubled or altered."""
    buffer, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(pickled("zip")))
    names = source.namelist()
    chosen, act = draw.choice(names), draw.randrange(6)
    with zipfile.ZipFile(buffer, "w", draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])) as archive:
        for name in names:
            part = source.read(name)
            if name == chosen and act == 0:
                continue
            if name == chosen and act == 1:
                part = altered(part, draw)
            if name == chosen and act == 2:
                part = part + bytes(draw.choice([10**4, 10**7]))
            archive.writestr(draw.choice(["x", "../x", "/x"]) if name == chosen and act == 3 else name, part)
        if act == 4:
            archive.writestr(f"archive/data/{draw.choice([0, 99])}", bytes(draw.choice([4, 10**7])))
        if act == 5:
            archive.writestr(names[0], pickle.dumps(draw.choice([3, [], {"a": 1}])))
    return buffer.getvalue()


def check_weights(data: st.DataObject, folder: Path) -> str:
    """A file of weights, given as ``init``."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    mark = folder / "ran"
    made = {
        ".safetensors": [lambda: altered(safe(), draw), lambda: header_edits(draw), lambda: header_edits(draw)],
        ".pt": [
            lambda: altered(pickled("zip"), draw),
            lambda: altered(pickled("old"), draw),
            lambda: odd_weights(draw, mark),
            lambda: repacked(draw),
        ],
    }
    suffix = draw.choice(sorted(made))
    path = folder / f"weights{suffix}"
    path.write_bytes(draw.choice(made[suffix])())
    try:
        return load(path)
    finally:
        assert not mark.exists(), "a file ran code"


@cache
def compressed(folder: Path) -> Path:
    """A compressed model as ``save`` writes it."""
    small = hodec.convert(net(), hodec.make_plan(net(), 4, example_input=torch.zeros(2, 6, 12, 12)))
    hodec.save(small, folder / "whole.safetensors")
    return folder / "whole.safetensors"


def check_models(data: st.DataObject, folder: Path) -> str:
    """A compressed model and the ``.json`` beside it: what is read answers as it did before."""
    from fuzz_plans import edited

    draw = random.Random(data.draw(st.integers(0, 2**32)))
    whole, path = compressed(folder), folder / "small.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copy(whole.with_suffix(suffix), path.with_suffix(suffix))
    act, beside = draw.randrange(4), path.with_suffix(".json")
    if act == 0:
        path.write_bytes(altered(path.read_bytes(), draw))
    elif act == 1:
        beside.write_bytes(altered(beside.read_bytes(), draw))
    else:
        tree = json.loads(beside.read_text())
        for _ in range(draw.choice([1, 1, 2])):
            tree = edited(tree, draw)
        beside.write_text(json.dumps(tree))
    small = hodec.load(path, net() if draw.random() < 0.8 else None)
    x = torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given, wanted = small.eval()(x), hodec.load(whole, net()).eval()(x)
    assert torch.allclose(given, wanted, rtol=1e-4, atol=1e-5), "a file that was altered gave other numbers"
    return "read, as it was"
