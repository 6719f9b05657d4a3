"""Conversion from a folder of safetensors files to another, one layer in memory at a time; and reading the result."""

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from hodec._version import __version__
from hodec.calibration.input_covariance import InputCovariance
from hodec.conversion.keeping import CONFIG_ENTRY, config_entry
from hodec.conversion.streamed import Streamed, Unit, put_tensors, shared_paths
from hodec.conversion.swap import convert
from hodec.errors import CheckpointError
from hodec.io.atomic import JsonObject, read_json, sha256, write_json, writing
from hodec.io.shards import SHARD_BYTES, Shards, grouped, shard_name, write_index, write_shard
from hodec.io.tensors import bits, kind_of
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

# The structure of a converted model in a folder of shards.
STRUCTURE, FORMAT, VERSION = "hodec.json", "hodec-shards", 1

CONFIG = "config.json"

# Files of a checkpoint folder that hold weights; all others (config, tokenizer) go over to the converted one.
WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def convert_shards(
    skeleton: nn.Module,
    plan: Plan,
    weights: str | Path,
    out: str | Path,
    *,
    covariances: Mapping[str, InputCovariance] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert a model that lies in safetensors files, without loading it: each weight is read once.

    In memory are one layer, its decomposition, and the output that fills one shard. The result equals that of
    ``convert`` of the loaded model bit for bit.

    Args:
        skeleton: the dense net on the meta device (``with torch.device("meta"):``); it says how layers are built and
            in which types numbers are written.
        plan: what is factorized, for example by ``make_plan(skeleton, .., weights=weights)``.
        weights: a folder of shards with their index, an index, or one ``.safetensors`` file, by the names of the
            skeleton's ``state_dict``.
        out: an empty or new folder. It gets shards, ``model.safetensors.index.json``, ``hodec.json`` with the plan and
            the SHA-256 of each shard, and what else lies beside ``weights`` (config, tokenizer); ``config.json`` gets
            the plan too. ``hodec.load(out, skeleton)`` reads it, and ``hodec.from_pretrained(out)`` a model of Hugging
            Face.
        covariances: as for ``convert``.
        shard_bytes: bytes of a written shard at most, unless one layer's factors are larger; at least 1.

    Raises:
        CheckpointError: weights that are missing, unreadable or of another shape; an output folder that holds files.
        PlanError, ConvertError, TrainingError: as ``convert``.

    Example::

        with torch.device("meta"):
            skeleton = build()
        plan = hodec.make_plan(skeleton, "ratio", method="svd", example_input=tokens)
        hodec.convert_shards(skeleton, plan, "checkpoint/", "small/")
        small = hodec.load("small/", skeleton)
    """
    source, folder = Shards(weights), Path(out)
    if shard_bytes < 1:
        raise CheckpointError(f"convert_shards: shard_bytes={shard_bytes} given; allowed: a whole number from 1")
    stream = Streamed(skeleton, plan, covariances=covariances)
    places = _places(stream, source)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CheckpointError(f"convert_shards: {folder} holds files; name a new or an empty folder")
        _write(stream, source, places, folder, shard_bytes)
        _write_rest(source, plan, folder)


def _places(stream: Streamed, source: Shards) -> dict[str, str]:
    """Path in the dense model that is needed -> name of the tensor in the shards.

    Raises:
        CheckpointError: one is missing or of another shape or kind.
    """
    dense, places = stream.blank.state_dict(), dict[str, str]()
    for path in (path for unit in stream.units for path in unit.sources):
        name = places[path] = source.first_of([path, *stream.aliases[path]], f"{type(stream.blank).__name__}.{path}")
        stored, own = source[name], dense[path]
        if stored.shape != own.shape or stored.dtype.is_floating_point != own.is_floating_point():
            raise CheckpointError(
                f"{source.path}: {name} is {stored.dtype} {stored.shape}, and the skeleton has {own.dtype} "
                f"{tuple(own.shape)}: give the skeleton of this checkpoint"
            )
    if spare := [name for name in source if name not in places.values() and name not in stream.aliases]:
        log.warning(
            "%s: %d tensors are in no place of the model and left out, first %s", source.path, len(spare), spare[0]
        )
    return places


def _write(stream: Streamed, source: Shards, places: Mapping[str, str], folder: Path, most: int) -> None:
    """The shards, their index and the structure, which are written last."""
    units = {unit.keys[0]: unit for unit in stream.units}
    groups = grouped({key: stream.nbytes(unit) for key, unit in units.items()}, most)
    files, digests = dict[str, list[str]](), dict[str, str]()
    for number, group in enumerate(groups, 1):
        file = shard_name(number, len(groups))
        made: dict[str, Tensor] = {}
        for key in group:
            made |= _made(stream, units[key], source, places)
        digests[file], files[file] = write_shard(folder / file, made), list(made)
        log.info("%s written: shard %d of %d", folder / file, number, len(groups))
    structure = {"format": FORMAT, "version": VERSION, "hodec": __version__, "sha256": digests}
    write_json(folder / STRUCTURE, {**structure, "plan": stream.plan.to_dict()})
    write_index(folder, files, sum(map(stream.nbytes, units.values())))


def _made(stream: Streamed, unit: Unit, source: Shards, places: Mapping[str, str]) -> dict[str, Tensor]:
    return stream.make(unit, {path: source.read(places[path]) for path in unit.sources})


def _write_rest(source: Shards, plan: Plan, folder: Path) -> None:
    """What lies beside the weights, with the plan in the config of a model of Hugging Face."""
    beside = source.path if source.path.is_dir() else source.path.parent
    for file in sorted(beside.iterdir()) if source.path.suffix != ".safetensors" else ():
        if not file.is_file() or file.name.endswith(WEIGHTS) or file.name.startswith("."):
            continue
        if file.name == CONFIG:
            config = read_json(file, "config of the model")
            write_json(folder / CONFIG, {**config, CONFIG_ENTRY: config_entry(plan)})
        else:
            shutil.copyfile(file, folder / file.name)


def load_shards(folder: Path, skeleton: nn.Module) -> nn.Module:
    """``load`` of a folder that ``convert_shards`` wrote, shard by shard.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or of another model; or a skeleton on the meta device
            has buffers that no file holds.
        PlanError: the plan is for another skeleton.
    """
    structure = _structure(folder)
    small = convert(skeleton, Plan.from_dict(structure["plan"]), decompose=False)
    shards = Shards(folder)
    for file in shards.files:
        if sha256(file) != structure["sha256"].get(file.name):
            raise CheckpointError(f"{file} is truncated or was altered: its SHA-256 is not the one in {STRUCTURE}")
    return filled(small, shards)


def filled(small: nn.Module, shards: Shards) -> nn.Module:
    """``small`` itself with the numbers of these shards; what it has on the meta device goes to the CPU.

    Raises:
        CheckpointError: they do not fit, or buffers stay on the meta device.
    """
    _check_fit(shards, small.state_dict(), shared_paths(small))
    check_ties(shards.path, small, shards, shards.read)
    for file in shards.files:
        put_tensors(small, {name: shards.read(name) for name, one in shards.items() if one.file == file})
    if blank := [name for name, t in [*small.named_parameters(), *small.named_buffers()] if t.is_meta]:
        raise CheckpointError(
            f"{shards.path}: {len(blank)} buffers of the skeleton are on the meta device and in no file, first "
            f"{blank[0]}, because the net computes them when it is built: build the skeleton with memory, or read a "
            "model of Hugging Face by hodec.from_pretrained"
        )
    return small


def check_ties(path: Path, small: nn.Module, names: Collection[str], read: Callable[[str], Tensor]) -> None:
    """Refuse tensors that differ and would be read into one of the model, the last of which would win.

    Args:
        path: of the file, for the message.
        names: of its tensors.
        read: gives the tensor of a name.
    """
    for paths in dict.fromkeys(map(tuple, shared_paths(small).values())):
        first, *others = [name for name in paths if name in names] or [""]
        for other in others:
            if bits(read(first)) != bits(read(other)):
                raise CheckpointError(
                    f"{path}: the skeleton has one tensor for {first} and {other}, and the file two that differ: untie "
                    "them in the skeleton"
                )


def _structure(folder: Path) -> JsonObject:
    value = read_json(folder / STRUCTURE, "structure of the model")
    known = isinstance(value, dict) and (value.get("format"), value.get("version")) == (FORMAT, VERSION)
    if not known or not isinstance(value.get("sha256"), dict) or "plan" not in value:
        raise CheckpointError(f"{folder / STRUCTURE} is no structure of version {VERSION}, or was altered")
    return dict(value)


def _check_fit(shards: Shards, own: Mapping[str, Tensor], aliases: Mapping[str, list[str]]) -> None:
    missing = [name for name in own if not any(path in shards for path in aliases[name])]
    wrong = [name for name, one in shards.items() if name not in own or own[name].shape != one.shape]
    if missing or wrong:
        first = (missing or wrong)[0]
        raise CheckpointError(
            f"{shards.path} does not fit this skeleton: {len(missing)} tensors are missing and {len(wrong)} are of "
            f"another shape or left over, first {first}"
        )
    for name, one in shards.items():
        if not own[name].is_meta and kind_of(own[name]) != kind_of(own[name].new_empty(0, dtype=one.dtype)):
            raise CheckpointError(f"{shards.path}: {name} holds numbers of another kind than the model's")
