"""Where every parameter of a model stands: in a layer of the plan, in one that stays dense, or among the others."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

# A parameter of several axes that is multiplied by nothing is named where it holds more than this share of the model.
LARGE = 0.01

NORMS, BIASES, TABLES = "norms", "biases", "tables, tokens and scales"


def own_weights(model: nn.Module, known: Collection[str], macs: Mapping[str, int], method: str) -> dict[str, str]:
    """Parameters that a reader of the plan would ask about and that no known layer owns, with the reason.

    Args:
        known: names of layers (or of parameters) that are planned or refused already.
        macs: parameter -> multiply-adds of its products, see ``count_by_parameter``.
        method: the name of the plan's method.
    """
    total, found = sum(p.numel() for p in model.parameters()), {}
    for path, parameter, kind in _parameters(model, known):
        if kind is not None:
            continue
        if path in macs:
            found[path] = f"method {method} has no layer for a weight of {_owner(model, path)}"
        elif parameter.numel() > LARGE * total and parameter.shape[0] > 1:
            found[path] = f"a parameter of {_owner(model, path)} that is in no product with this input"
    return found


def parameter_costs(
    model: nn.Module, planned: Collection[str], skipped: Collection[str], macs: Mapping[str, int]
) -> tuple[dict[str, tuple[int, int | None]], dict[str, int]]:
    """What stays dense: parameters and multiply-adds of each skipped layer, and the parameters of all others by kind.

    A parameter that several layers share is counted once, for the first of them. Multiply-adds are None where no
    product with the weight was seen: it is looked up, not called, or computed with as a copy.
    """
    costs: dict[str, tuple[int, int | None]] = dict.fromkeys(skipped, (0, None))
    known, other = {*planned, *skipped}, dict.fromkeys((NORMS, BIASES, TABLES), 0)
    for path, parameter, found in _parameters(model, known):
        kind = TABLES if found is None else found
        if kind in other:
            other[kind] += parameter.numel()
        elif kind in costs:
            params, before = costs[kind]
            more = macs.get(path)
            costs[kind] = params + parameter.numel(), before if more is None else (before or 0) + more
    return costs, {kind: count for kind, count in other.items() if count}


def _parameters(model: nn.Module, known: Collection[str]) -> Iterator[tuple[str, Tensor, str | None]]:
    """Each parameter once, with its first path, and the known layer that it belongs to or its kind."""
    paths: dict[Tensor, list[str]] = {}
    for path, each in model.named_parameters(remove_duplicate=False):
        paths.setdefault(each, []).append(path)
    for parameter, (first, *others) in paths.items():
        owner = next((owner for path in (first, *others) if (owner := _known_owner(path, known)) is not None), None)
        yield first, parameter, _kind(model, first, parameter, owner)


def _owner(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path.rpartition(".")[0])).__name__


def _known_owner(path: str, known: Collection[str]) -> str | None:
    """The parameter itself or the nearest module around it that is known."""
    while path not in known and path:
        path = path.rpartition(".")[0]
    return path if path in known else None


def _kind(model: nn.Module, path: str, parameter: Tensor, owner: str | None) -> str | None:
    """The known layer that a parameter belongs to, or its kind; None for a weight that none of them owns."""
    vector = sum(n > 1 for n in parameter.shape) <= 1
    if vector and "bias" in path.rpartition(".")[2]:
        return BIASES
    if owner is not None:
        return owner
    if "norm" in _owner(model, path).lower():
        return NORMS
    return TABLES if vector else None
