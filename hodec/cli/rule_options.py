"""Flags of rank rules and methods: what verbs that make a plan share.

They are made from the classes of the rules and methods, which need neither torch nor Hydra: ``hodec --help`` must not
wait for them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from hodec.cli import value_of
from hodec.errors import ConfigError, flag_of
from hodec.experiment.config.groups import kinds_of, method_names, not_among
from hodec.experiment.config.options import RunSettings
from hodec.options import Setting, settings_of, values_or_errors
from hodec.ranks import RULES, Manual, RankRule

OFFERED = tuple(name for name, rule in RULES.items() if not rule.runs_net)
RANKS = settings_of(RunSettings)["tt_ranks"]

Flags = dict[str, Setting]  # flag -> the setting that it gives


def rule_flags() -> dict[str, Flags]:
    """The flags of each rule that can be had without training."""
    by_rule = {name: settings_of(RULES[name]).values() for name in OFFERED}
    return {name: _flags([RANKS] if name == "manual" else settings) for name, settings in by_rule.items()}


def method_flags() -> dict[str, Flags]:
    """The flags of each method; the split of channels by layer has none: it is edited in the plan."""
    kinds = kinds_of("method")
    return {
        name: _flags(one for one in settings_of(kinds[name]).values() if one.name != "modes") for name in method_names()
    }


def _flags(settings: Iterable[Setting]) -> Flags:
    return {flag_of(one.key): one for one in settings}


def _all(flags: Mapping[str, Flags]) -> Flags:
    return {flag: one for own in flags.values() for flag, one in own.items()}


def decided_flags() -> tuple[str, ...]:
    """Every flag whose answer stands in a plan."""
    return ("--rule", "--method", "--include", "--exclude", *_all(method_flags()), *_all(rule_flags()))


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--rule`` and the settings of all rules: those of ``rule_from``."""
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--rule",
        metavar="NAME",
        help=f"what chooses ranks: {' | '.join(OFFERED)} (default: manual with --ranks, else budget)",
    )
    _add(group, rule_flags())


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--method``, its settings, ``--include`` and ``--exclude``: those of ``method_from``."""
    group = parser.add_argument_group("layers")
    names = " | ".join(method_names())
    group.add_argument("--method", metavar="NAME", help=f"how layers are factorized: {names} (default: tt)")
    _add(group, method_flags())
    add_glob_options(group)


def add_glob_options(group: argparse._ArgumentGroup) -> None:
    """Add ``--include`` and ``--exclude``."""
    for flag, what in (("--include", "layers that may be factorized"), ("--exclude", "layers that stay dense")):
        group.add_argument(flag, metavar="GLOB", action="append", help=f"{what}; can be given several times")


def _add(group: argparse._ArgumentGroup, flags: Mapping[str, Flags]) -> None:
    """Add flags. Values are read in ``rule_from``: argparse would say less, in two lines."""
    for flag, one in _all(flags).items():
        owners = ", ".join(name for name, own in flags.items() if flag in own)
        default = "" if one.default is None else f" (default: {one.default})"
        doc = one.doc.replace("null:", "without it:").replace("%", "%%")
        group.add_argument(flag, metavar="VALUE", help=f"{owners}: {doc}; {one.words(null=False)}{default}")


def rule_from(options: argparse.Namespace) -> RankRule:
    """The rank rule that the options ask for.

    Args:
        options: parsed by a parser with ``add_rule_options``.

    Raises:
        ConfigError: an unknown rule or one that needs training; a setting out of range, or one the rule has not.
    """
    name = _rule_name(options)
    given = _given(options, rule_flags(), "--rule", name)
    ranks = given.pop("tt_ranks", None)
    if name == "manual" and ranks is None:
        raise ConfigError(f"--ranks: missing with --rule manual; allowed: {RANKS.words(null=False)}")
    made, errors = values_or_errors(RULES[name], given)
    if made is None:
        raise errors[0]
    rule = cast(RankRule, made)
    return replace(rule, tt_ranks=ranks) if isinstance(rule, Manual) else rule


def _given(options: argparse.Namespace, flags: Mapping[str, Flags], chooser: str, name: str) -> dict[str, Any]:
    """Settings that were given, by name, read; all of them are those of the rule or method that was chosen."""
    given, own = {}, flags[name]
    for flag in _all(flags):
        text = value_of(options, flag)
        if text is None:
            continue
        if flag not in own:
            owners = " | ".join(other for other, settings in flags.items() if flag in settings)
            takes = ", ".join(own) or "no settings"
            raise ConfigError(
                f"{flag} does not go with {chooser} {name}, which takes {takes}; {chooser} {owners} has it"
            )
        given[own[flag].name] = read(flag, own[flag], text)
    return given


def read(flag: str, one: Setting, text: str) -> object:
    """The value that ``text`` stands for.

    Raises:
        ConfigError: it stands for none that is allowed.
    """
    try:
        value = READERS.get(one.type, parse)(text)
        if value is not None and not list(one.bad_parts(value)):
            return value
    except ValueError:
        pass
    raise ConfigError(f"{flag}: {text!r} given; allowed: {one.words(null=False)}")


def _names(text: str) -> list[str]:
    """Names with commas between them, in brackets or not."""
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


def parse(text: str) -> object:
    """A number, a word, a list or a mapping, as on the command line of ``hodec train``: ``{layer1.*:9,fc:[3,4]}``.

    Raises:
        ValueError: brackets that do not match, or an entry of a mapping without a value.
    """
    text = text.strip()
    if text[:1] + text[-1:] == "[]":
        return [parse(part) for part in _split(text[1:-1], ",")]
    if text[:1] + text[-1:] == "{}":
        pairs = [_split(part, ":") for part in _split(text[1:-1], ",")]
        return {key.strip().strip("'\""): parse(value) for key, value in pairs}
    for number in (int, float):
        if re.fullmatch(r"[-+.\deE]+", text):
            try:
                return number(text)
            except ValueError:
                continue
    if not text or len(_split(text, ",")) > 1 or text == "null":
        raise ValueError(text)
    return {"true": True, "false": False}.get(text, text)


def _split(text: str, at: str) -> list[str]:
    """The parts of ``text`` between the characters ``at`` that stand in no brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for one in text:
        quote = "" if one == quote else quote or (one if one in "'\"" else "")
        depth += 0 if quote else (one in "[{") - (one in "]}")
        if one == at and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += one
    if depth or quote:
        raise ValueError(text)
    return parts if text.strip() else []


# How the text of a setting is read where it is not a value by itself.
READERS: dict[object, Callable[[str], object]] = {str: str, list[str]: _names}


def _rule_name(options: argparse.Namespace) -> str:
    name = options.rule or ("manual" if options.ranks is not None else "budget")
    if name in RULES and name not in OFFERED:
        raise ConfigError(
            f"--rule: {name} is not possible here: it {RULES[name].runs_net}; hodec train ranks={name} does, with a "
            f"data set and trained weights (init=FILE). Allowed: {' | '.join(OFFERED)}"
        )
    return _known("--rule", name, OFFERED)


def _known(flag: str, name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ConfigError(not_among(flag, name, list(names)).removesuffix("."))
    return name


def method_from(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``make_plan``: ``method``, its settings, ``include``, ``exclude``.

    Args:
        options: parsed by a parser with ``add_method_options``.

    Raises:
        ConfigError: an unknown method, a setting that it does not have, or one out of range.
    """
    names = tuple(method_names())
    method, several = options.method, getattr(options, "methods", None)
    if method is not None and several is not None:
        raise ConfigError(f"--method: {method!r} given together with --methods; allowed: one of the two")
    method = _known("--method", names[0] if method is None else method, names)
    for name in _names(several or ""):
        _known("--methods", name, names)
    how = _given(options, method_flags(), "--method", method)
    return {"method": method, **how, "include": options.include, "exclude": options.exclude}
