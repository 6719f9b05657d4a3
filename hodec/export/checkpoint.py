"""A compressed model on disk: safetensors beside a JSON of its structure, checked when read."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hodec._version import __version__
from hodec.conversion.keeping import PLAN_ATTRIBUTE
from hodec.conversion.swap import convert
from hodec.errors import CheckpointError, ConfigError
from hodec.export.shards import check_ties, filled, load_shards
from hodec.inference import uncompiled
from hodec.io.atomic import JsonObject, read_json, sha256, write_json, writing
from hodec.io.shards import Shards
from hodec.io.tensors import bits, kind_of, load_tensors, not_numbers, save_tensors, tensor_shapes
from hodec.layers.base import FactorizedLayer, same_random_state
from hodec.methods import get_method
from hodec.models import build_model
from hodec.plan.plan import Plan, check_plan

FORMAT, VERSION = "hodec-model", 1

# Numbers of the dense net for each one in the file, above which a .json is not believed: ten times the 1,005 of
# ResNet-18 at rank 1 in every layer.
MOST_RATIO = 10_000

# What a net is built from by its name.
FACTS = ("model", "in_channels", "num_classes", "image_size")


def save(
    model: nn.Module, path: str | Path, plan: Plan | None = None, *, facts: Mapping[str, object] | None = None
) -> None:
    """Write a converted model: ``path`` (safetensors) and the same name with ``.json`` (plan, SHA-256, facts).

    Args:
        model: what ``convert`` made from ``plan``, trained further or not.
        path: ends in ``.safetensors``.
        plan: the plan it was converted by; by default the one that ``convert`` and ``load`` leave on the model.
        facts: plain JSON values to keep with it. With those of FACTS, ``load`` needs no skeleton.

    Raises:
        CheckpointError: a path with another ending or that cannot be written, or a model that is not what ``convert``
            makes from the plan.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> hodec.save(hodec.convert(net, plan), "small.safetensors")
        >>> hodec.load("small.safetensors", net)[0].factors()[0].shape
        torch.Size([4, 64])
    """
    path, model = Path(path), uncompiled(model)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a compressed model is written to a .safetensors file, not {path.suffix!r}")
    plan = _plan_of(model) if plan is None else plan
    check_plan(plan)
    _check_converted(model, plan)
    tensors = model.state_dict()
    if other := [name for name, one in tensors.items() if not isinstance(one, Tensor)]:
        raise CheckpointError(f"save: {other[0]} of the state_dict is a {type(tensors[other[0]]).__name__}, no tensor")
    with writing(path):
        save_tensors(path, _once(tensors), {"format": FORMAT})  # one entry: of several, the order would vary
        structure = {
            "format": FORMAT,
            "version": VERSION,
            "hodec": __version__,
            "sha256": sha256(path),
            "facts": dict(facts or {}),
            "plan": plan.to_dict(),
        }
        write_json(path.with_suffix(".json"), structure)


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are an earlier one under another name, such as factors that layers share."""
    first: dict[object, str] = {}
    for name, t in tensors.items():
        first.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else name, name)
    return {name: tensors[name] for name in first.values()}


def _plan_of(model: nn.Module) -> Plan:
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if not isinstance(plan, Plan):
        raise CheckpointError(
            "save: this model holds no plan, as it is not what hodec.convert or hodec.load returned; give the plan: "
            "hodec.save(model, path, plan)"
        )
    return plan


def _check_converted(model: nn.Module, plan: Plan) -> None:
    """Refuse to write what could not be read again."""
    modules = dict(model.named_modules(remove_duplicate=False))
    users = [(name, layer, one) for key, layer in plan.items() for name, one in zip(layer.names(key), layer.users)]
    for name, whole, layer in users:
        found = modules.get(layer.module(name))
        own = [getattr(found, key, None) for key in ("shape", "ranks", "modes")]
        right = type(found) is get_method(layer.method).tied_layer(whole.layer_type, layer.layer_type, layer.groups)
        if not right or own != [layer.shape, layer.ranks, layer.modes]:
            raise CheckpointError(
                f"save: {name} is {found if found is None else type(found).__name__} in this model, and {layer.method} "
                f"at ranks {list(layer.ranks)} in the plan; give what hodec.convert made from it (a fused net is "
                "written by hodec.to_onnx or hodec.to_program)"
            )
    known = {modules[layer.module(name)] for name, _, layer in users}
    if spare := [name for name, one in modules.items() if isinstance(one, FactorizedLayer) and one not in known]:
        raise CheckpointError(
            f"save: {spare[0]} is factorized in this model, and not in the plan: give the plan of all its layers"
        )


def load(path: str | Path, skeleton: nn.Module | None = None) -> nn.Module:
    """Rebuild a compressed model, in the training mode and number type of its skeleton.

    Args:
        path: the ``.safetensors`` file that ``save`` wrote, its ``.json`` beside it; or a folder of ``convert_shards``.
        skeleton: the dense net, of any weights; it is left as it was. On the meta device, which takes no memory, the
            result is on the CPU. None: the net that the file names, as those of runs do (``compressed.safetensors``).

    Raises:
        CheckpointError: a file is missing, truncated or altered, holds NaN, or belongs to another model; or there is no
            skeleton and the file names no net.
        PlanError: the plan is for another skeleton.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> small, x = hodec.convert(net, plan), torch.randn(8, 64)
        >>> hodec.save(small, "small.safetensors")
        >>> fresh = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> torch.equal(hodec.load("small.safetensors", fresh)(x), small(x))
        True
    """
    path = Path(path)
    if path.is_dir():
        if skeleton is None:
            raise CheckpointError(
                f"{path}: a folder of shards names no net: give it as skeleton, hodec.load(path, net)"
            )
        return load_shards(path, skeleton)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a compressed model is read from its .safetensors file, not {path.suffix!r}")
    structure = read_structure(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if sha256(path) != structure["sha256"]:
        raise CheckpointError(f"{path} is truncated or was altered: its SHA-256 is not the one in its .json")
    skeleton = named_skeleton(path, structure) if skeleton is None else skeleton
    small = convert(skeleton, Plan.from_dict(structure["plan"]), decompose=False)
    if any(p.is_meta for p in small.parameters()):
        return filled(small, Shards(path))
    tensors = load_tensors(path)
    if bad := not_numbers(tensors):
        raise CheckpointError(
            f"{path} holds NaN in {len(bad)} tensors, first {bad[0]}: training had broken down when it was saved; load "
            "an earlier file"
        )
    own = {name: tuple(t.shape) for name, t in small.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    needed = own.keys() if small.state_dict().keys() == given.keys() else _once(small.state_dict()).keys()
    if wrong := sorted(n for n in needed | given.keys() if own.get(n) != given.get(n)):
        raise _misfit(path, wrong, own, given)
    kinds = {name: kind_of(t) for name, t in small.state_dict().items()}
    if wrong := [name for name, t in tensors.items() if kind_of(t) != kinds[name]]:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors hold numbers of another kind than the model's, first {wrong[0]} (file "
            f"{kind_of(tensors[wrong[0]])}, model {kinds[wrong[0]]}): they would become others"
        )
    check_ties(path, small, tensors, tensors.__getitem__)
    small.load_state_dict(tensors, strict=False)  # what is not in the file is there under another name
    return small


def read_structure(path: str | Path) -> JsonObject:
    """The JSON beside a compressed model: ``facts`` say how its dense net is built.

    Raises:
        CheckpointError: missing, unreadable or of another format.
    """
    structure = read_json(Path(path).with_suffix(".json"), "structure of the model")
    if not isinstance(structure, dict) or structure.get("format") != FORMAT or structure.get("version") != VERSION:
        raise CheckpointError(f"{Path(path).with_suffix('.json')} is not a hodec model of version {VERSION}")
    if missing := [key for key in ("sha256", "plan") if key not in structure]:
        raise CheckpointError(f"{Path(path).with_suffix('.json')} lacks {', '.join(missing)}: it was altered")
    return dict(structure)


def named_skeleton(path: str | Path, structure: JsonObject) -> nn.Module:
    """The dense net that a compressed model's facts name, with fresh weights; the random state stays as it is.

    Raises:
        CheckpointError: they name none, or one that cannot be built.
    """
    facts, where = facts_of(path, structure), Path(path).with_suffix(".json")
    sizes = {"in_channels": facts["in_channels"], "num_classes": facts["num_classes"]}
    build = partial(build_model, facts["model"], **sizes, image_size=min(facts["image_size"]))
    try:
        with same_random_state([]):
            with torch.device("meta"):
                blank = build()
            _check_size(Path(path), blank, Plan.from_dict(structure["plan"]))  # before any memory is taken
            return build()
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: no net can be built from its facts {facts}: {error}") from error


def facts_of(path: str | Path, structure: JsonObject) -> JsonObject:
    """What a compressed model's dense net is built from: the facts of FACTS, checked.

    Raises:
        CheckpointError: the file does not say it, or in values of another kind.
    """
    where, given = Path(path).with_suffix(".json"), structure.get("facts")
    facts: JsonObject = given if isinstance(given, dict) else {}
    if missing := [key for key in FACTS if key not in facts]:
        raise CheckpointError(
            f"{where} does not say how the dense net is built (its facts lack {', '.join(missing)}): give the net as "
            "skeleton, hodec.load(path, skeleton)"
        )
    side = facts["image_size"]
    numbers = [facts["in_channels"], facts["num_classes"], *(side if isinstance(side, list) else [side])]
    if not (isinstance(facts["model"], str) and len(numbers) == 4 and all(type(n) is int and n >= 1 for n in numbers)):
        raise CheckpointError(
            f"{where}: no net can be built from its facts {facts}: model is a name, in_channels and num_classes are "
            "whole numbers from 1, image_size a list of two"
        )
    return facts


def _check_size(path: Path, blank: nn.Module, plan: Plan) -> None:
    """Refuse a net that is larger than its file says; ``blank`` is the dense net without memory.

    Raises:
        CheckpointError: a tensor outside the plan has another shape in the file, or the dense net is out of proportion.
    """
    users = [(name, one) for key, layer in plan.items() for name, one in zip(layer.names(key), layer.users)]
    planned = {one.parameter(name) for first, one in users for name in (first, *one.aliases)}
    dense = {name: tuple(t.shape) for name, t in blank.state_dict().items()}
    stored = tensor_shapes(path)
    numbers, held = (sum(math.prod(shape) for shape in shapes.values()) for shapes in (dense, stored))
    wrong = [name for name, shape in dense.items() if name not in planned and stored.get(name) != shape]
    if wrong and numbers > held:
        raise _misfit(path, wrong, dense, stored)
    if numbers > MOST_RATIO * held:
        raise CheckpointError(
            f"{path} holds {held:,} numbers, and the dense net of its .json {numbers:,}, more than {MOST_RATIO} times "
            "as many: its facts were altered. Give the net as skeleton, hodec.load(path, skeleton)"
        )


def _misfit(
    path: Path, wrong: Sequence[str], own: Mapping[str, object], given: Mapping[str, object]
) -> CheckpointError:
    first = wrong[0]
    return CheckpointError(
        f"{path} does not fit this skeleton: {len(wrong)} of {len(own)} tensors differ, first {first} "
        f"(file {given.get(first, 'absent')}, model {own.get(first, 'absent')})"
    )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all tensors of a model, in order: equal digests mean bit-equal weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(bits(tensor))
    return found.hexdigest()
