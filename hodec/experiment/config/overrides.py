"""Reads the command line before Hydra does and lists everything that is wrong with it, in one error.

Hydra stops at the first mistake and words it in its own terms. Here each override is parsed, looked up and
typed by itself; then what is left is composed, once per value of a sweep, and checked as a whole.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hodec.errors import near_matches
from hodec.experiment.config.schema import Config, open_schema, problem, refuse, schema_leaves, to_config, validate

EXAMPLE = "'tt_ranks={layer1.*:8}'"
# beginnings of lines of Hydra's messages that say nothing to a user
NOISE = ("full_key:", "object_type=", "reference_type=", "See http", "Config search", "provider=", "To append")


@dataclass(frozen=True)
class Menu:
    """What the settings folder offers and how the command line asks for it."""

    folder: Path
    config_name: str
    groups: dict[str, list[str]]
    search: list[str] = field(default_factory=list)  # override that adds the folder of --config-dir
    multirun: bool = False
    sweeper: bool = False  # whether another sweeper than Hydra's own was chosen


def check_overrides(argv: Sequence[str], conf_dir: Path) -> None:
    """Check the arguments of `train.py` against the files of `conf_dir`; those that only ask for help pass.

    Raises:
        ConfigError: with every problem found: what was given, what is allowed, and what was perhaps meant.
    """
    arguments, unknown = get_args_parser().parse_known_args(list(argv))
    if arguments.help or arguments.hydra_help or arguments.shell_completion or arguments.info is not None:
        return
    if arguments.experimental_rerun is not None:
        return
    options = [option for option in unknown if option.startswith("-")]
    stray = [line for line in unknown if line not in options]
    problems = [f"{option}: no such option; a setting has no dashes: tt_ranks=8" for option in options]
    if stray and not options:
        problems.append(f"{' '.join(stray)}: options such as -m stand before or after all settings, not between them")
    folder = (conf_dir.parent / (arguments.config_path or conf_dir)).resolve()
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        menu = _menu(arguments, folder, loader)
        problems += _repeated(arguments.overrides)
        own: list[list[str]] = []
        of_hydra: list[list[str]] = []
        for line in [*arguments.overrides, *stray]:
            good, bad = _inspect(line, menu, loader)
            problems += bad
            (of_hydra if line.lstrip("+~").startswith("hydra") else own).append(good)
        for lines in _variants([good for good in own if good]):
            problems += _composed(lines, menu)
        lines = [line for good in of_hydra for line in good]
        if lines:  # Hydra's own settings last and alone, so that a mistake in them hides no other
            problems += _composed(lines, menu, of_hydra=True)
    refuse(problems)


def _menu(arguments: argparse.Namespace, folder: Path, loader: ConfigLoader) -> Menu:
    search = []
    if arguments.config_dir is not None:
        extra = Path(arguments.config_dir).resolve()
        if not extra.is_dir():
            refuse([f"--config-dir: {arguments.config_dir!r} given; allowed: a folder that exists"])
        search = [f"hydra.searchpath=['file://{extra}']"]
    groups = {
        group: loader.get_group_options(group, overrides=search) for group in loader.list_groups("") if group != "hydra"
    }
    lines = arguments.overrides
    return Menu(
        folder=folder,
        config_name=arguments.config_name or "config",
        groups=groups,
        search=search,
        multirun=arguments.multirun or "hydra.mode=MULTIRUN" in lines,
        sweeper=any(line.startswith("hydra/sweeper=") for line in lines),
    )


def _repeated(lines: Sequence[str]) -> list[str]:
    """Keys given more than once: the last would win, as when a shell expands an unquoted KEY={1,2}."""
    pairs = [line.lstrip("+").partition("=") for line in lines]
    counts = Counter(key for key, _, value in pairs if not value.startswith("{") and not key.startswith("hydra"))
    return [
        f"{key}: given {count} times; allowed: once. A sweep is written -m {key}=A,B"
        for key, count in counts.items()
        if count > 1
    ]


def _variants(alternatives: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """The first value of everything, then each other value of a sweep once: the sum, not the product."""
    first = [lines[0] for lines in alternatives]
    yield first
    for index, lines in enumerate(alternatives):
        for line in lines[1:]:
            yield [*first[:index], line, *first[index + 1 :]]


def _inspect(line: str, menu: Menu, loader: ConfigLoader) -> tuple[list[str], list[str]]:
    """One argument: (its values that can be composed, each as an override; its problems)."""
    try:
        override = OverridesParser.create(loader).parse_overrides([line])[0]
    except HydraException:
        return [], [_unreadable(line, menu)]
    if override.is_hydra_override():
        swept = [f"{line}: a setting of Hydra takes one value"] if override.is_sweep_override() else []
        return ([], swept) if swept else ([line], [])
    wrong = _wrong_form(override, line, menu)
    if wrong:
        return [], [wrong]
    good, bad = [], []
    for single, value in _expand(override):
        found = _value_problems(override.key_or_group, value, menu)
        bad += found
        good += [] if found else [single]
    if override.is_sweep_override() and not menu.multirun:
        key = override.key_or_group
        bad.append(f"{line}: several values need -m, which makes it a sweep; a list is written {key}=[...]")
    return good, bad


def _unreadable(line: str, menu: Menu) -> str:
    """Why Hydra's grammar cannot read an argument, as far as can be guessed."""
    key, equals, value = line.partition("=")
    for opening, closing in ("[]", "{}", "()"):
        if line.count(opening) != line.count(closing):
            return f"{line}: {opening} and {closing} do not match; quote the argument for the shell: {EXAMPLE}"
    if not equals:
        choices = [f"{group}={line}" for group, options in menu.groups.items() if line in options]
        hint = f". Did you mean: {', '.join(choices)}?" if choices else f", quoted for the shell: {EXAMPLE}"
        return f"{line}: a setting is written KEY=VALUE{hint}"
    if not re.fullmatch(r"[+~]{0,2}[\w./@]*\w", key):
        return _unknown(key, menu)
    reason = "holds '='" if "=" in value else "cannot be read"
    return f"""{line}: the value {reason}; quote it twice: '{key}="{value.strip(chr(34) + chr(39))}"'"""


def _wrong_form(override: Override, line: str, menu: Menu) -> str:
    """What is wrong with the left side of an override, or with sweeping over it; empty when nothing is."""
    key = override.key_or_group
    known = key in menu.groups or key in schema_leaves() or _is_section(key)
    if override.package is not None or not known:
        return _unknown(override.get_key_element().lstrip("+~"), menu)
    if override.is_delete():
        return f"{line}: a setting cannot be removed; give it a value, such as {key}=null"
    mapping = isinstance(override.value(), (dict, list)) and key not in menu.groups
    if (override.is_add() and not mapping) or (override.is_force_add() and key in menu.groups):
        return f"{line}: {key} is there already; write {key}=... without '+'"
    if override.is_interval_sweep() and not menu.sweeper:
        return f"{line}: an interval needs a sweeper that draws from it: hydra/sweeper=optuna"
    if override.is_discrete_sweep() and not list(override.sweep_iterator()):
        return f"{line}: no value matches"
    return ""


def _unknown(key: str, menu: Menu) -> str:
    """A key that does not exist, with the keys that were perhaps meant."""
    for name, leaf in schema_leaves().items():
        if key.startswith(f"{name}.") and leaf.kind is Any:
            return f"{key}: entries are given as a mapping: '{name}={{{key[len(name) + 1 :]}: ...}}'"

    def likeness(known: str) -> tuple[float, float]:
        """Of the last words or of the whole keys, whichever is more; then of the whole keys."""
        ends = SequenceMatcher(None, key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]).ratio()
        whole = SequenceMatcher(None, key, known).ratio()
        return max(ends, whole), ends + whole

    scores = {known: likeness(known) for known in [*menu.groups, *schema_leaves()]}
    close = sorted((known for known in scores if scores[known][0] >= 0.6), key=lambda known: -scores[known][1])[:3]
    hint = f"Did you mean: {', '.join(close)}?" if close else "All settings: --cfg job"
    return f"{key}: no such setting. {hint}"


def _expand(override: Override) -> Iterator[tuple[str, Any]]:
    """Each value of an override, as an override of its own and as a value; of an interval, both ends."""
    key, value = override.get_key_element(), override.value()
    if not override.is_sweep_override():
        yield str(override.input_line), value
        return
    ends = [str(value.start), str(value.end)] if isinstance(value, IntervalSweep) else []
    for text in ends or override.sweep_string_iterator():
        single = f"{key}={text}"
        yield single, OverridesParser.create().parse_override(single).value()


def _value_problems(key: str, value: Any, menu: Menu) -> list[str]:
    """Problems of a value by itself: an option that does not exist, keys in a mapping, types."""
    if key in menu.groups and not isinstance(value, dict):
        options = menu.groups[key]
        if value in options or (key == "experiment" and value is None):
            return []
        return [_not_among(key, value, options)]
    return [found for name, one in _settings({key: value}) for found in _type_problems(name, one, menu)]


def _not_among(key: str, value: Any, options: list[str]) -> str:
    return f"{key}: {value!r} given; allowed: {' | '.join(options)}.{near_matches(str(value), options)}"


def _settings(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each setting in a tree; free-form mappings such as tt_ranks stay whole."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and _is_section(name):
            yield from _settings(value, f"{name}.")
        else:
            yield name, value


def _is_section(name: str) -> bool:
    return any(leaf.startswith(f"{name}.") for leaf in schema_leaves())


def _type_problems(key: str, value: Any, menu: Menu) -> list[str]:
    if key not in schema_leaves():
        return [_unknown(key, menu)]
    try:
        OmegaConf.update(open_schema(), key, value)
    except OmegaConfBaseException:
        return [problem(key, value)]
    return []


def _composed(lines: Sequence[str], menu: Menu, *, of_hydra: bool = False) -> list[str]:
    """Problems of the settings as a whole: ranges, combinations, files that do not fit the schema."""
    try:
        config = to_config(compose(menu.config_name, overrides=[*menu.search, *lines]))
        if of_hydra:
            return []
    except Exception as error:  # composing reads nothing but settings, so whatever it raises is about them
        return _explain(error, menu)
    problems = validate(config) + _name_problems(config, menu)
    if menu.multirun and config.trainer.devices > 1:
        problems.append(f"trainer.devices: {config.trainer.devices} given with -m; allowed in a sweep: 1")
    return problems


def _name_problems(config: Config, menu: Menu) -> list[str]:
    """Names of models and methods; those that exist are those that the files of the group name."""
    problems = []
    for group, name in (("model", config.model.name), ("method", config.method.name)):
        files = [cast(DictConfig, OmegaConf.load(path)) for path in sorted((menu.folder / group).glob("*.yaml"))]
        known = [str(file.get("name")) for file in files if file.get("source") != "torchvision"]
        if name not in known and not name.startswith("torchvision/"):
            problems.append(_not_among(f"{group}.name", name, known))
    problems += [_not_among("ranks.methods", name, known) for name in config.ranks.methods or () if name not in known]
    return problems


def _explain(error: Exception, menu: Menu) -> list[str]:
    """The problems behind an error of Hydra or OmegaConf, in words of this module where there are any."""
    source = re.search(r"In '([^']+)'", str(error))
    path = menu.folder / f"{source[1]}.yaml" if source else menu.folder
    if path.is_file():
        found = list(_file_problems(path, menu))
        if found:
            return found
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", None) or "")
    for name, leaf in schema_leaves().items():
        if key.startswith(f"{name}.") and leaf.kind is Any:
            entry = key[len(name) + 1 :]
            return [f"{name}: the chosen files give no {entry!r} to change; to add it: '++{name}={{{entry}: ...}}'"]
    parts = [part.strip() for part in f"{error}\n{cause}".splitlines()]
    return [" ".join(dict.fromkeys(part for part in parts if part and not part.startswith(NOISE)))]


def _file_problems(path: Path, menu: Menu) -> Iterator[str]:
    """Unknown keys and wrong types in one file of settings."""
    relative = path.relative_to(menu.folder)
    content = OmegaConf.to_container(OmegaConf.load(path))
    is_global = "@package _global_" in path.read_text() or len(relative.parts) == 1
    if relative.parts[0] == "experiment" and not is_global:
        yield f"{relative}: the first line must be '# @package _global_'"
        return
    if not isinstance(content, dict):
        yield f"{relative}: a list given; allowed: lines of KEY: VALUE"
        return
    own = {key: value for key, value in content.items() if key not in ("defaults", "hydra")}
    for key, value in _settings(own if is_global else {relative.parts[0]: own}):
        for found in _type_problems(key, value, menu):
            yield f"{relative}: {found}"
