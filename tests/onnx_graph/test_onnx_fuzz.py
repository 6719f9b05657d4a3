"""Random graphs are decomposed rightly; broken files are refused in one line, whatever is broken in them."""

import random
from contextlib import suppress

import numpy as np
import pytest

from hodec.errors import HodecError, PlanError
from hodec.methods import METHODS
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Energy, Manual, Ratio
from hodec.ranks.planning import PlanSettings

from small_graphs import answer, conv_net, node, numbers, relative, save  # isort: skip

FAST = 15
SEEDS = [*range(FAST), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(FAST, 200))]


class NothingLeft(Exception):
    """A net of which no layer can be decomposed, or is worth it."""


def decomposed(*paths, **options):
    try:
        return decompose_file(*paths, **options)
    except PlanError as error:
        raise (NothingLeft if "no layer is left" in str(error) else error) from error


def random_net(path, seed):
    """A chain of random layers with random settings, some of which share a weight or a branch."""
    draw = random.Random(seed)
    dims = draw.choice([1, 2, 2, 2, 3])
    size = [draw.randint(5, 9) for _ in range(dims)]
    channels, now, nodes, weights = draw.randint(1, 9), "x", [], {}
    first = (draw.choice(["n", 2]), channels, *size)
    for k in range(draw.randint(1, 5)):
        out, kernel = draw.randint(1, 12), [draw.choice([1, 1, 2, 3]) for _ in range(dims)]
        transposed, groups = draw.random() < 0.25, draw.choice([1, 1, 1, 2])
        groups = groups if channels % groups == out % groups == 0 and not transposed else 1
        settings = {"strides": [draw.choice([1, 1, 2]) for _ in kernel], "group": groups}
        if draw.random() < 0.3:
            settings["auto_pad"] = draw.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
        else:
            settings["pads"] = [draw.randint(0, n - 1) for n in (*kernel, *kernel)]
        if not draw.randint(0, 3) and "auto_pad" not in settings:
            settings["dilations"] = [draw.choice([1, 2]) for _ in kernel]
        shape = (channels, out, *kernel) if transposed else (out, channels // groups, *kernel)
        name = f"w{k}"
        weights[name] = numbers(*shape, seed=seed * 10 + k)
        words = f"{now} {name}"
        if draw.random() < 0.5:
            weights[f"b{k}"] = numbers(out, seed=k)
            words += f" b{k}"
        label = draw.choice([f"layer {k}", f"net/l.{k}", ""])
        nodes.append(
            node(
                "ConvTranspose" if transposed else "Conv",
                words,
                f"h{k}",
                **({"name": label} if label else {}),
                **settings,
            )
        )
        nodes[-1].input[:] = words.split()
        if draw.random() < 0.5:
            nodes.append(node(draw.choice(["Relu", "Sigmoid"]), f"h{k}", f"a{k}"))
            now = f"a{k}"
        else:
            now = f"h{k}"
        channels = out
    nodes.append(node("GlobalAveragePool", now, "pooled"))
    nodes.append(node("Flatten", "pooled", "flat"))
    weights["last"] = numbers(channels, 6, seed=seed)
    nodes.append(node(*draw.choice([("MatMul", "flat last"), ("Gemm", "flat last")]), "y"))
    return save(path, nodes, weights, inputs={"x": first}, opset=draw.choice([11, 13, 17, 20])), (2, *first[1:])


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graphs(tmp_path, seed):
    source, size = random_net(tmp_path / "in.onnx", seed)
    x = np.random.default_rng(seed).standard_normal(size).astype("float32")
    try:
        (wanted,) = answer(source, x=x)
    except Exception:  # kernels larger than what earlier layers leave
        pytest.skip("onnxruntime does not run it")
    out, draw = tmp_path / "out.onnx", random.Random(seed)
    method = draw.choice([name for name in METHODS if name != "tt_classical"])
    options = PlanSettings(
        allow_larger=True,
        n_modes=draw.choice([1, 2, 3]),
        execution=draw.choice(["auto", *(["chain"] if method == "tt" else [])]),
    )
    with suppress(NothingLeft):
        decomposed(source, out, method=method, rule=Manual(10**6), options=options)
        (given,) = answer(out, x=x)
        assert relative(given, wanted) < 1e-3
    rule = draw.choice([Ratio(0.5), Energy(0.6)])
    with suppress(NothingLeft):
        outcome = decomposed(source, out, method=method, rule=rule, force=True)
        assert outcome.after.params <= outcome.before.params
        assert np.isfinite(answer(out, x=x)[0]).all()


def broken(content: bytes, seed: int) -> bytes:
    """One of: bits flipped, a piece cut out, a piece doubled, cut off, noise written over it."""
    draw = random.Random(seed)
    data = bytearray(content)
    # most of a model is weights: what surrounds them is at its ends
    start = draw.choice([draw.randrange(len(data)), draw.randrange(200), len(data) - 1 - draw.randrange(400)])
    length = draw.choice([1, 2, 8, 40])
    kind = draw.randrange(5)
    if kind == 0:
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[start : start + length]
    elif kind == 2:
        data[start:start] = data[start : start + length]
    elif kind == 3:
        del data[start:]
    else:
        data[start : start + length] = draw.randbytes(length)
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_broken_files(tmp_path, seed):
    content = conv_net(tmp_path / "whole.onnx").read_bytes()
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(broken(content, seed))
    message = ""
    try:
        decompose_file(source, out, method="tucker", rule=Manual(4))
    except HodecError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "whole.onnx"]
    else:
        ran, x = False, np.zeros((1, 8, 10, 12), np.float32)
        with suppress(Exception):
            answer(source, x=x)
            ran = True
        if ran:
            answer(out, x=x)
