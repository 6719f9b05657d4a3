"""Calibration data of a model file: arrays, images or a function's dicts, as calls that the file takes."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hodec.calibration.images import IMAGE_ENDINGS, Array, Pixels, image_calls
from hodec.errors import DataError

Feeds = Mapping[str, Array]
Given = str | Path | Mapping[str, Array] | Iterable[Feeds]

# Fewer samples cannot be split into a part to fit and a part to judge by.
LEAST_SAMPLES, LEAST_HELD = 8, 4
# Where a file takes any number of samples at a time: most in one call, as activations are in memory, and least calls.
CALL, CALLS = 8, 24


@dataclass(frozen=True)
class InputSpec:
    """An input of a file.

    Attributes:
        dims: its axes, None where the file leaves one open; None altogether where their number is unknown.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Samples:
    """Calls of a file.

    Attributes:
        calls: what each call is fed.
        counts: samples in each.
        words: what they were made from, in one line.
        labels: of each call, (samples, ..).
    """

    calls: tuple[Feeds, ...]
    counts: tuple[int, ...]
    words: str
    labels: tuple[Array, ...] = ()

    def __len__(self) -> int:
        """Samples in all calls."""
        return sum(self.counts)

    def part(self, indices: Iterable[int]) -> "Samples":
        """Some of the calls."""
        at = list(indices)
        calls, counts = tuple(self.calls[i] for i in at), tuple(self.counts[i] for i in at)
        labels = tuple(self.labels[i] for i in at) if self.labels else ()
        return replace(self, calls=calls, counts=counts, labels=labels)

    def split(self) -> "tuple[Samples, Samples]":
        """A part to fit and a part that is held out: a third of the calls, drawn with a seed, at least 4 samples.

        Raises:
            DataError: there are too few calls for that.
        """
        order = [int(i) for i in np.random.default_rng(0).permutation(len(self.calls))]
        for step in (3, 2):
            held = set(order[: max(1, len(order) // step)])
            parts = [sorted(held), [i for i in range(len(order)) if i not in held]]
            out, fit = (self.part(each) for each in parts)
            if len(out) >= LEAST_HELD <= len(fit):
                return fit, out
        raise DataError(
            f"--data: {len(self)} samples in {len(self.calls)} calls cannot be split into a part to fit and a part of "
            f"at least {LEAST_HELD} samples to judge by; give more samples, or the same ones in smaller batches"
        )


def load_samples(
    given: Given,
    specs: Sequence[InputSpec],
    *,
    values: Mapping[str, ArrayLike] | None = None,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
    pixels: Pixels | None = None,
    labels: str | Path | Array | None = None,
) -> Samples:
    """The calls that the data come to, checked against the file's inputs.

    Args:
        given: ``.npz`` or ``.npy`` (first axis: samples), a folder of such (one call each), a folder of images,
            ``file.py:function`` that gives dicts name -> array (one call each), or such dicts themselves.
        values: name of an input -> the number that fills it, or its array, for those that the data do not have.
        sizes: of inputs that the file leaves open: what images are scaled to, what values fill.
        pixels: how images become numbers.
        labels: ``.npy`` with one row a sample, in the order of the data.

    Raises:
        DataError: no data, fewer than 8 samples, NaN or Inf, or arrays that do not fit the inputs.
    """
    filled = _filled(specs, values or {}, sizes or {})
    rest = [one for one in specs if one.name not in filled]
    calls, words = _read(given, rest, sizes or {}, pixels or Pixels())
    calls = [{**_cast(call, rest, k), **filled} for k, call in enumerate(calls)]
    counts = [_count(call, rest) for call in calls]
    if sum(counts) < LEAST_SAMPLES:
        raise DataError(f"--data: {sum(counts)} samples given; allowed: {LEAST_SAMPLES} or more; 16 to 256 are enough")
    samples = Samples(tuple(calls), tuple(counts), words)
    return samples if labels is None else replace(samples, labels=_labels(labels, counts))


def _filled(
    specs: Sequence[InputSpec], values: Mapping[str, ArrayLike], sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    known = {one.name: one for one in specs}
    filled = {}
    for name, value in values.items():
        if name not in known:
            raise DataError(f"--input {name}: the model has no such input; it has {', '.join(known)}")
        one = known[name]
        size = sizes.get(name) or tuple(1 if n is None else n for n in one.dims or ())
        array = np.asarray(value)
        filled[name] = _fitting(array if array.ndim else np.full(size, array), one, "--input")
    return filled


def _read(
    given: Given, specs: Sequence[InputSpec], sizes: Mapping[str, tuple[int, ...]], pixels: Pixels
) -> tuple[list[dict[str, Array]], str]:
    """The calls, and what they were made from."""
    if isinstance(given, Mapping):
        return _stacked({name: np.asarray(one) for name, one in given.items()}, specs), "arrays"
    if not isinstance(given, str | Path):
        return _smaller(list(_named(given)), specs), "dicts"
    path, text = Path(given), str(given)
    if ".py:" in text and not path.exists():
        return _smaller(list(_named(_function_of(text))), specs), text
    if path.is_dir():
        return _folder(path, specs, sizes, pixels)
    if not path.is_file():
        raise DataError(f"--data: {text} does not exist; allowed: .npz, .npy, a folder, or file.py:function")
    return _stacked(_arrays(path, specs), specs), path.name


def _folder(
    path: Path, specs: Sequence[InputSpec], sizes: Mapping[str, tuple[int, ...]], pixels: Pixels
) -> tuple[list[dict[str, Array]], str]:
    files = sorted(path.iterdir())
    arrays = [one for one in files if one.suffix in (".npz", ".npy")]
    images = [one for one in sorted(path.rglob("*")) if one.suffix.lower() in IMAGE_ENDINGS]
    if arrays and images:
        raise DataError(f"--data: {path} holds both arrays and images; keep one kind in a folder")
    if images:
        wanted = [(one.name, one.dtype, one.dims) for one in specs]
        return image_calls(images, wanted, sizes, pixels)
    if not arrays:
        raise DataError(f"--data: folder {path} holds no .npz, .npy or images ({', '.join(sorted(IMAGE_ENDINGS))})")
    calls = [_with_batch(_arrays(one, specs), specs) for one in arrays]
    return _smaller(calls, specs), f"{len(arrays)} files of {path}"


def _arrays(path: Path, specs: Sequence[InputSpec]) -> dict[str, Array]:
    """Name of an input -> array of a file."""
    try:
        loaded = np.load(path, allow_pickle=False)
        found = {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else loaded
    except (OSError, ValueError, AttributeError, EOFError) as error:
        raise DataError(f"--data: {path} cannot be read as {path.suffix or 'an array'}: {error}") from error
    if isinstance(found, dict):
        return found
    if len(specs) != 1:
        names = ", ".join(one.name for one in specs)
        raise DataError(f"--data: {path} is one array, the model takes {names}; give a .npz with an array for each")
    return {specs[0].name: found}


def _function_of(text: str) -> Any:
    """The function that ``file.py:name`` names. It is the user's own code, and runs as such."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{text}: {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{text}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, name, None)
    except Exception as error:  # the user's code raises what it likes
        raise DataError(f"{text}: importing {path} fails: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise DataError(f"{text}: {path} has no function {name}")
    return found


function_of = _function_of


def _named(given: Any) -> Iterator[dict[str, Array]]:
    try:
        for one in given() if callable(given) else given:
            if not isinstance(one, Mapping):
                raise DataError(f"--data: the function gives {type(one).__name__}; allowed: dicts name -> array")
            yield {str(name): np.asarray(array) for name, array in one.items()}
    except DataError:
        raise
    except Exception as error:  # of the user's own code
        raise DataError(f"--data: the function fails: {type(error).__name__}: {error}") from error


# -- samples and calls -----------------------------------------------------------------------------------------


def _stacked(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> list[dict[str, Array]]:
    """Calls from arrays whose first axis counts samples.

    An array of an input's own number of axes is cut along its first one; one with an axis more holds whole calls; one
    that has the input's own fixed size while others have more samples is the same in all calls.
    """
    _check_names(arrays, specs)
    ranks = {one.name: len(one.dims) for one in specs if one.dims is not None}
    whole = {name for name, array in arrays.items() if array.ndim == ranks.get(name, array.ndim) + 1}
    counts = {name: len(array) for name, array in arrays.items() if array.ndim}
    most = max((counts[name] for name in whole), default=0) or max(counts.values(), default=0)
    fixed = {one.name: one.dims[0] for one in specs if one.dims and one.dims[0] is not None}
    same = {
        n for n in arrays if n not in whole and (n not in counts or (counts[n] != most and counts[n] == fixed.get(n)))
    }
    cut = [name for name in arrays if name not in whole and name not in same]
    sizes = {fixed[name] for name in cut if name in fixed}
    step = 1 if whole else next(iter(sizes), None) or max(1, min(CALL, most // CALLS))
    for name in (*whole, *cut):
        if len(sizes) > 1 or counts[name] != most or (name in cut and most % step and name in fixed):
            raise DataError(
                f"--data: the first axes of {', '.join(f'{n} ({c})' for n, c in counts.items())} do not count the same "
                f"samples, in calls of {', '.join(map(str, sorted(sizes))) or step} at a time"
            )
    at = range(0, most, step)
    return [
        {
            **{name: arrays[name] for name in same},
            **{name: arrays[name][i] for name in whole},
            **{name: arrays[name][i : i + step] for name in cut},
        }
        for i in at
    ]


def _with_batch(call: Mapping[str, Array], specs: Sequence[InputSpec]) -> dict[str, Array]:
    """A call from one file: a sample without its batch axis gets one."""
    _check_names(call, specs)
    short = {one.name for one in specs if one.dims and call[one.name].ndim == len(one.dims) - 1}
    return {name: array[None] if name in short else array for name, array in call.items()}


def _smaller(calls: list[dict[str, Array]], specs: Sequence[InputSpec]) -> list[dict[str, Array]]:
    """The same samples in more calls, where there are few large ones or the file takes fewer at a time."""
    parts: list[dict[str, Array]] = []
    for call in calls:
        _check_names(call, specs)
        lengths = {len(call[one.name]) for one in specs if one.dims and call[one.name].ndim == len(one.dims)}
        firsts = {one.dims[0] for one in specs if one.dims}
        alone = len(lengths) == 1 and len(firsts) == 1
        first, length = next(iter(firsts), None), next(iter(lengths), 1)
        step = first or max(1, min(CALL, len(calls) * length // CALLS))
        if alone and length > step and length % step == 0 or alone and first is None and length > step:
            parts += [{name: array[i : i + step] for name, array in call.items()} for i in range(0, length, step)]
        else:
            parts.append(call)
    return parts


def _count(call: Feeds, specs: Sequence[InputSpec]) -> int:
    """Samples in a call: the first axis of the first input with two axes or more."""
    return next((len(call[one.name]) for one in specs if call[one.name].ndim >= 2), 1)


# -- checks ----------------------------------------------------------------------------------------------------


def _check_names(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> None:
    names = [one.name for one in specs]
    if missing := [name for name in names if name not in arrays]:
        raise DataError(
            f"--data: input {', '.join(missing)} is not in it; it has {', '.join(arrays) or 'nothing'}. Add an array "
            f"of that name, or fill it by --input {missing[0]}=NUMBER"
        )
    if unknown := [name for name in arrays if name not in names]:
        raise DataError(f"--data: {unknown[0]} is no input of the model; it takes {', '.join(names)}")


def _cast(call: Mapping[str, Array], specs: Sequence[InputSpec], at: int) -> dict[str, Array]:
    """The call's arrays in the types of the inputs.

    Raises:
        DataError: another shape, numbers that the type cannot hold, NaN or Inf.
    """
    return {one.name: _fitting(call[one.name], one, f"--data: {one.name} of call {at}") for one in specs}


def _fitting(array: Array, one: InputSpec, where: str) -> Array:
    fits = one.dims is None or (
        len(one.dims) == array.ndim and all(want in (None, n) for want, n in zip(one.dims, array.shape))
    )
    if not fits or not all(array.shape):
        wanted = "any" if one.dims is None else [n or "any" for n in one.dims]
        raise DataError(f"{where} has shape {list(array.shape)}; the model takes {wanted}")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where} is of type {array.dtype}; allowed: numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where} holds NaN or Inf; take that sample out")
    with np.errstate(over="ignore", invalid="ignore"):
        cast: NDArray[Any] = array.astype(one.dtype)
    same = np.array_equal(cast, array) if one.dtype.kind in "iub" else bool(np.isfinite(cast).all())
    if not same:
        raise DataError(f"{where} has numbers that the model's {one.dtype} cannot hold")
    return np.asarray(cast, order="C")


def _labels(given: str | Path | Array, counts: Sequence[int]) -> tuple[Array, ...]:
    try:
        array = np.load(given, allow_pickle=False) if isinstance(given, str | Path) else np.asarray(given)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--labels: {given} cannot be read as .npy: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim < 1 or len(array) != sum(counts):
        shape = getattr(array, "shape", type(array).__name__)
        raise DataError(f"--labels: {shape} given; allowed: one row for each of the {sum(counts)} samples")
    ends = np.cumsum(counts)
    return tuple(array[end - count : end] for end, count in zip(ends, counts, strict=True))
