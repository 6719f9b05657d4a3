"""Code of one's own by its dotted name, ``my_package.nets.Net``: found, checked against its arguments, and called.

Nothing is imported before the user trusts its package; see ``trust``. Nothing here imports torch.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, cast

from hodec.errors import ConfigError, near_matches
from hodec.experiment.config import trust
from hodec.options import BadParts, Settings

TARGET = "_target_"  # Hydra's own word
NAME_WORDS = "the dotted name of what is called: PACKAGE.MODULE.NAME"


def bad_name(value: object) -> BadParts:
    """Yield what is no dotted name of two parts or more."""
    if not isinstance(value, str) or "." not in value or not trust.PACKAGE.fullmatch(value):
        yield "", value


def bad_node(value: object) -> BadParts:
    """Yield what is no mapping with a dotted name under ``_target_``."""
    if not isinstance(value, Mapping) or any(bad_name(value.get(TARGET))):
        yield "", value


def bad_nodes(value: object) -> BadParts:
    """Yield the entries of a list that are no mappings with a ``_target_``."""
    if not isinstance(value, list | tuple):
        yield "", value
        return
    for index, node in enumerate(value):
        yield from ((f"[{index}]", part) for _, part in bad_node(node))


class WithTargets(Settings):
    """Base of settings among which a ``_target_`` stands."""

    def problems(self) -> Iterator[str]:
        """What is wrong with them and with their arguments; imports the packages that the user trusts."""
        raise NotImplementedError


def load(name: str) -> Any:
    """What a dotted name stands for: a class, a function, a value. Packages of the working folder are found last.

    Raises:
        ConfigError: the user does not trust its package, it cannot be imported, or it is defined in another one.
    """
    if not trust.allows(name):
        raise ConfigError(trust.refusal(name))
    if not trust.is_open(name) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there stands in for an installed package
    found, rest = _module(name)
    for part in rest:
        if not hasattr(found, part):
            close = near_matches(part, [one for one in vars(found) if not one.startswith("_")])
            raise ConfigError(f"{name!r} given; {_name_of(found)} has no {part!r}.{close}")
        found = getattr(found, part)
    home = getattr(found, "__module__", None) if isinstance(found, type) or callable(found) else None
    if isinstance(found, ModuleType) or (home and not trust.is_open(name) and not trust.allows(f"{home}.")):
        owner = found.__name__ if isinstance(found, ModuleType) else home
        raise ConfigError(f"{name!r} given, which is of {owner}; allowed: {trust.FLAG} {owner}, if you know it")
    return found


def _module(name: str) -> tuple[object, list[str]]:
    """The longest part of a dotted name that is a module, and the rest.

    Raises:
        ConfigError: none is, or its import fails.
    """
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            return import_module(module), parts[count:]
        except ModuleNotFoundError as error:
            if f"{module}.".startswith(f"{error.name}."):
                continue
            raise ConfigError(
                f"{name!r} given; importing {module} needs {error.name}, which is not installed"
            ) from error
        except Exception as error:  # whatever an import raises
            text = f"{name!r} given; importing {module} fails: {type(error).__name__}: {error}"
            raise ConfigError(text) from error
    raise ConfigError(
        f"{name!r} given; there is no package {parts[0]!r}, neither installed nor in the folder {os.getcwd()}"
    )


def _name_of(found: object) -> str:
    return str(getattr(found, "__name__", type(found).__name__))


def nodes_below(value: object, key: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each mapping with a ``_target_`` in a value, itself included, with its key among all settings."""
    if isinstance(value, Mapping):
        if TARGET in value:
            yield key, value
        for name, one in value.items():
            yield from nodes_below(one, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from nodes_below(one, f"{key}[{index}]")


def problems(key: str, node: Mapping[str, object], offered: Sequence[str] = (), places: int = 0) -> Iterator[str]:
    """What is wrong with a node that has a ``_target_``, and with those below it: its name, or its arguments.

    Args:
        key: of the node among all settings.
        offered: names of arguments that hodec adds where they are taken.
        places: positional arguments that hodec puts first.
    """
    for where, each in nodes_below(dict(node), key):
        try:
            target = load(str(each[TARGET]))
        except ConfigError as error:
            yield f"{where}.{TARGET}: {error}"
            continue
        given = [name for name in each if not (name.startswith("_") and name.endswith("_"))]
        own = where == key
        yield from wrong_arguments(where, target, given, offered if own else (), places if own else 0)


def bad_function(name: str) -> Iterator[str]:
    """What is wrong with the name of a function that is called without arguments."""
    try:
        target = load(name)
    except ConfigError as error:
        yield str(error)
        return
    if not callable(target):
        yield f"{name!r} given; allowed: a function"
    needed = [one.name for one in (_parameters(target) or {}).values() if _is_needed(one)] if callable(target) else []
    if needed:
        yield f"{name!r} given, which needs {', '.join(needed)}; allowed: a function of no arguments"


def wrong_arguments(
    key: str, target: object, given: Sequence[str], offered: Sequence[str] = (), places: int = 0
) -> Iterator[str]:
    """Arguments that a target does not take, with those that were perhaps meant, and those that it lacks."""
    if not callable(target):
        if given:
            yield f"{key}: {', '.join(given)} given to a value that takes no arguments"
        return
    parameters = _parameters(target)
    if parameters is None:
        return
    kinds = {name: one.kind for name, one in parameters.items()}
    named = [
        name for name, kind in kinds.items() if kind in (_Parameter.POSITIONAL_OR_KEYWORD, _Parameter.KEYWORD_ONLY)
    ]
    named = named[places:]
    if _Parameter.VAR_KEYWORD not in kinds.values():
        for name in (one for one in given if one not in named):
            close = near_matches(name, named) or f" It takes: {', '.join(named) or 'none'}"
            yield f"{key}.{name}: {_name_of(target)} has no such argument.{close}"
    for name in named:
        if _is_needed(parameters[name]) and name not in given and name not in offered:
            way = "" if "." in key else f": +{key}.{name}=VALUE"
            yield f"{key}.{name}: missing; {_name_of(target)} needs it{way}"


_Parameter = inspect.Parameter


def _is_needed(one: inspect.Parameter) -> bool:
    return one.default is _Parameter.empty and one.kind not in (_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD)


def _parameters(target: Callable[..., object]) -> Mapping[str, inspect.Parameter] | None:
    """What a target takes; None where nobody can tell."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def maker(node: Mapping[str, object], **offered: object) -> Callable[..., Any]:
    """A node with a ``_target_`` as a function: its arguments are those of the node, and what is offered and taken.

    Args:
        node: those below it are called now.
        offered: arguments by name, each handed over where the target has an argument of that name.

    Raises:
        ConfigError: see ``load``.
    """
    from hydra.utils import instantiate

    for _, each in nodes_below(dict(node), ""):
        load(str(each[TARGET]))
    target = load(str(node[TARGET]))
    if not callable(target):
        return lambda: target
    taken = _parameters(target) or {}
    extra = {name: value for name, value in offered.items() if name in taken and name not in node}
    made = instantiate({**node, "_partial_": True}, _convert_="all")
    return partial(cast(Callable[..., Any], made), **extra)
