"""Reads the command line before Hydra does and lists everything that is wrong with it, in one error.

Hydra stops at the first mistake and words it in its own terms. Here each override is parsed by itself; then all are
composed, once per value of a sweep, and the values that come out are read as the options that they are of.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hodec.errors import ConfigError, Use, quoted
from hodec.experiment.config import searchpath, trust
from hodec.experiment.config.arguments import only_informs, parser
from hodec.experiment.config.groups import groups, has_setting, not_among, settings_by_key, takes_arguments, unknown
from hodec.experiment.config.objectives import wrong_direction
from hodec.experiment.config.options import CIFAR_RESNETS, SOURCES
from hodec.experiment.config.schema import read_config, refuse
from hodec.options import Setting

# Beginnings of what plugins of Hydra offer -> the extra that brings them.
PLUGINS = {
    "hydra/launcher/submitit": "slurm", "hydra/launcher/ray": "ray", "hydra/launcher/joblib": "sweep",
    "hydra/sweeper/optuna": "sweep",
}  # fmt: skip
EXAMPLE = "'tt_ranks={layer1.*:8}'"
# beginnings of lines of Hydra's messages that say nothing to a user
NOISE = ("full_key:", "object_type=", "reference_type=", "See http", "Config search", "provider=", "To append")


@dataclass(frozen=True)
class Menu:
    """What the settings folder offers and how the command line asks for it."""

    folder: Path
    config_name: str
    presets: dict[str, list[str]]
    places: list[str]  # the folders of --config-dir and hydra.searchpath
    multirun: bool
    sweeper: bool  # whether another sweeper than Hydra's own was chosen

    @cached_property
    def hydra(self) -> dict[str, object]:
        """Hydra's settings as the files give them without any argument; composed once, as it takes a tenth second."""
        return _plain_hydra(compose(self.config_name, return_hydra_config=True))


def check_overrides(argv: Sequence[str], conf_dir: Path) -> None:
    """Check the arguments of `hodec train` against the files of `conf_dir`; those that only ask for help pass.

    Raises:
        ConfigError: with every problem found: what was given, what is allowed, and what was perhaps meant.
    """
    if only_informs(argv):
        return
    arguments, unread = parser().parse_known_args(list(argv))
    flags = [word for word in unread if word.startswith("-")]
    stray = [word for word in unread if word not in flags]
    problems = [f"{flag}: no such option; a setting has no dashes: tt_ranks=8" for flag in flags]
    if stray and not flags:
        problems.append(f"{' '.join(stray)}: options such as -m stand before or after all settings, not between them")
    folder = (conf_dir.parent / (arguments.config_path or conf_dir)).resolve()
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        menu = _menu(arguments, folder, loader)
        problems += _repeated(arguments.overrides)
        own: list[list[str]] = []
        of_hydra: list[str] = []
        for line in searchpath.others([*arguments.overrides, *stray]):
            good, bad = _inspect(line, menu, loader)
            problems += bad
            if line.lstrip("+~").startswith("hydra"):
                of_hydra += good
            elif good:
                own.append(good)
        for lines in _variants(own):
            problems += _composed(lines, menu)
        if of_hydra:  # last and alone, so that a mistake in them hides no other
            problems += _composed(of_hydra, menu, of_hydra=True)
        if menu.sweeper and not problems:
            problems += _wrong_direction([*(lines[0] for lines in own), *of_hydra], menu)
    if (arguments.config_path or arguments.config_name) and not trust.trusted():
        problems.append(f"--config-path, --config-name: such a file decides what code runs; allowed: with {trust.FLAG}")
    refuse(problems)


def _menu(arguments: argparse.Namespace, folder: Path, loader: ConfigLoader) -> Menu:
    places = searchpath.places(arguments.config_dir, arguments.overrides)
    search = searchpath.override(places)
    names = [group for group in loader.list_groups("") if group != "hydra"]
    lines = arguments.overrides
    return Menu(
        folder=folder,
        config_name=arguments.config_name or "config",
        presets={group: loader.get_group_options(group, overrides=search) for group in names},
        places=places,
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
    key, good, bad = override.key_or_group, [], []
    for single, value in _expand(override):
        presets = menu.presets.get(key, [])
        if presets and not isinstance(value, dict) and value not in presets and (key, value) != ("experiment", None):
            bad.append(not_among(key, value, presets))
        else:
            good.append(single)
    if override.is_sweep_override() and not menu.multirun:
        bad.append(f"{line}: several values need -m, which makes it a sweep; a list is written {key}=[...]")
    return good, bad


def _unreadable(line: str, menu: Menu) -> str:
    """Why Hydra's grammar cannot read an argument, as far as can be guessed."""
    key, equals, value = line.partition("=")
    for opening, closing in ("[]", "{}", "()"):
        if line.count(opening) != line.count(closing):
            return f"{line}: {opening} and {closing} do not match; quote the argument for the shell: {EXAMPLE}"
    if not equals:
        choices = [f"{group}={line}" for group, presets in menu.presets.items() if line in presets]
        hint = f". Did you mean: {', '.join(choices)}?" if choices else f", quoted for the shell: {EXAMPLE}"
        return f"{line}: a setting is written KEY=VALUE{hint}"
    if not re.fullmatch(r"[+~]{0,2}[\w./@]*\w", key):
        return _no_key(key)
    reason = "holds '='" if "=" in value else "cannot be read"
    return f"""{line}: the value {reason}; quote it twice: '{key}="{value.strip(chr(34) + chr(39))}"'"""


def _wrong_form(override: Override, line: str, menu: Menu) -> str:
    """What is wrong with the left side of an override, or with sweeping over it; empty when nothing is."""
    key = override.key_or_group
    group, _, last = key.rpartition(".")
    if _may_be_argument(key) and override.package is None and not override.is_delete():
        return ""  # of an option of one's own, or a mistake that shows when all is composed
    if last == "name" and group in menu.presets and key not in settings_by_key():
        return f"{key}: an option is chosen by its group: {group}={override.value()}"
    if override.package is not None or key not in {*menu.presets, *groups(), *settings_by_key()}:
        return _no_key(override.get_key_element().lstrip("+~").rstrip("="))
    if override.is_delete():
        return f"{line}: a setting cannot be removed; give it a value, such as {key}=null"
    mapping = isinstance(override.value(), dict | list) and key not in menu.presets
    added = override.is_add() and not mapping and not takes_arguments(group)
    if added or (override.is_force_add() and key in menu.presets):
        return _there_already(line, key)
    if override.is_interval_sweep() and not menu.sweeper:
        return f"{line}: an interval needs a sweeper that draws from it: hydra/sweeper=optuna"
    if override.is_discrete_sweep() and not list(override.sweep_iterator()):
        return f"{line}: no value matches"
    return ""


def _may_be_argument(key: str) -> bool:
    """Whether a key that is no setting may be an argument of code of one's own."""
    group, dot, rest = key.partition(".")
    known = key in settings_by_key() or _mapping(key) is not None or rest == "name"
    return bool(dot) and takes_arguments(group) and not known


def _no_key(key: str) -> str:
    """A key that does not exist, or that is an entry of a mapping."""
    owner = _mapping(key)
    if owner is not None:
        return f"{key}: entries are given as a mapping: '{owner.key}={{{key[len(owner.key) + 1 :]}: ...}}'"
    return unknown(key)


def _mapping(key: str) -> Setting | None:
    """The setting that holds a mapping of which ``key`` is an entry."""
    settings = (next(iter(owners.values())) for owners in settings_by_key().values())
    return next((one for one in settings if one.type is object and key.startswith(f"{one.key}.")), None)


def _expand(override: Override) -> Iterator[tuple[str, object]]:
    """Each value of an override, as an override of its own and as a value; of an interval, both ends."""
    key, value = override.get_key_element(), override.value()
    if not override.is_sweep_override():
        yield str(override.input_line), value
        return
    ends = [str(value.start), str(value.end)] if isinstance(value, IntervalSweep) else []
    for text in ends or override.sweep_string_iterator():
        single = f"{key}={text}"
        yield single, OverridesParser.create().parse_override(single).value()


def _composed(lines: Sequence[str], menu: Menu, *, of_hydra: bool = False) -> list[str]:
    """Problems of the settings as a whole: keys that an option does not have, types, ranges, combinations."""
    refusal: HydraException | None = None
    try:
        try:
            tree, files, hydra = _compose(lines, menu)
        except HydraException as error:
            if of_hydra:
                raise
            # A key that the chosen files do not have: added by force, so that all such keys are seen at once.
            refusal = error
            tree, files, hydra = _compose([_forced(line, menu) for line in lines], menu)
    except Exception as error:  # composing reads nothing but settings, so whatever it raises is about them
        return [str(error) if isinstance(error, ConfigError) else _explain(error)]
    untrusted = [] if trust.trusted() else _untrusted(hydra, lines if of_hydra else [], menu)
    if of_hydra:
        return untrusted
    if "experiment" in tree:
        return [f"{next(iter(files), 'experiment')}: the first line must be '# @package _global_'"]
    config, errors = read_config(tree)
    problems = [_located(text, files, lines) for text in (*(e.told(Use.in_hydra) for e in errors), *untrusted)]
    problems += [*_unknown_model(tree.get("model")), *_misadded(lines, tree)]
    for name in ("devices", "num_nodes") if config and menu.multirun else ():
        if (count := getattr(config and config.trainer, name)) > 1:
            problems.append(f"trainer.{name}: {count} given with -m; allowed in a sweep: 1")
    return problems or ([_not_added(lines) or _explain(refusal)] if refusal is not None else [])


def _there_already(line: str, key: str) -> str:
    return f"{line}: {key} is there already; write {key}=... without '+'"


def _misadded(lines: Sequence[str], tree: Mapping[str, object]) -> Iterator[str]:
    """The problems of settings that are added as if they were arguments of code of one's own."""
    for line in lines:
        key, _, value = line[1:].partition("=")
        group, _, last = key.partition(".")
        merged = value[:1] in ("{", "[")  # which Hydra adds to what is there
        if line.startswith("+") and not merged and takes_arguments(group) and has_setting(group, tree.get(group), last):
            yield _there_already(line, key)


def _not_added(lines: Sequence[str]) -> str:
    """The problem of arguments of code of one's own that are given as if they were settings; empty without any."""
    own = [line for line in lines if line[0] not in "+~" and _may_be_argument(line.partition("=")[0])]
    added = " ".join(quoted(f"+{line}") for line in own)
    return f"{own[0].partition('=')[0]}: an argument of one's own is added: {added}" if own else ""


def _wrong_direction(lines: Sequence[str], menu: Menu) -> list[str]:
    """The problem of a sweeper that optimises where it would search for the worst run."""
    tree, _, hydra = _compose(lines, menu)
    sweeper = cast(dict[str, object], hydra["sweeper"])
    problem = wrong_direction(tree["objective"], sweeper["direction"]) if "direction" in sweeper else ""
    return [f"{problem}; or choose hydra/sweeper=accuracy, or accuracy_macs"] if problem else []


def _untrusted(hydra: Mapping[str, object], lines: Sequence[str], menu: Menu) -> list[str]:
    """Settings of Hydra through which a file would run code; ``lines`` are those that the user has given himself."""
    own = menu.hydra
    if lines:
        with suppress(HydraException):  # a line that chooses from a folder of the user's
            own = _plain_hydra(compose(menu.config_name, overrides=list(lines), return_hydra_config=True))
    found = trust.set_by_files(hydra, own)
    return found or list(trust.unknown_targets(hydra))


def _plain_hydra(cfg: DictConfig) -> dict[str, object]:
    """Hydra's own settings as plain values, interpolations as they are written."""
    hydra = cast(dict[str, object], OmegaConf.to_container(cfg.hydra, resolve=False))
    return {key: value for key, value in hydra.items() if key != "searchpath"}


def _unknown_model(model: object) -> list[str]:
    """A name that is no net of hodec or of a package; those of torchvision and timm are known to them alone."""
    if not isinstance(model, dict) or model.get("source") != "hodec":
        return []
    name, known = model.get("name"), [*CIFAR_RESNETS, *trust.entry_targets("hodec.models")]
    if name in known or str(name).startswith(tuple(f"{source}/" for source in SOURCES)):
        return []
    return [not_among("model.name", name, [*known, *(f"{source}/NAME" for source in SOURCES)])]


def _compose(lines: Sequence[str], menu: Menu) -> tuple[dict[str, object], dict[str, str], dict[str, object]]:
    """The settings that Hydra puts together as plain values, the text of files of one's own among them, and Hydra's."""
    cfg = compose(menu.config_name, overrides=[*searchpath.override(menu.places), *lines], return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    tree = plain(cfg)
    folders = [*searchpath.folders(menu.places), menu.folder]
    files = {}
    for group, choice in choices.items():
        path = Path(group, f"{choice}.yaml")
        for folder in folders if group in menu.presets else ():
            if (group == "experiment" or folder != menu.folder) and (folder / path).is_file():
                files[str(path)] = (folder / path).read_text("utf-8")
    return tree, files, _plain_hydra(cfg)


def plain(cfg: DictConfig) -> dict[str, object]:
    """The settings that Hydra composed as plain values, without Hydra's own.

    Raises:
        ConfigError: an interpolation that cannot be resolved.
    """
    try:
        own = OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True
        )
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None
    return cast(dict[str, object], own)


def _forced(line: str, menu: Menu) -> str:
    """An override that adds its key where there is none; the choice of a preset stays as it is."""
    key, _, value = line.lstrip("+").partition("=")
    return line if key in menu.presets and not value.startswith("{") else f"++{key}={value}"


def _located(problem: str, files: dict[str, str], lines: Sequence[str]) -> str:
    """A problem with the name of the file that it is in; of the command line's own, without."""
    key = problem.split(":")[0].split("[")[0]
    given = [line.lstrip("+").partition("=") for line in lines]
    if any(name == key or (key.startswith(f"{name}.") and value.startswith("{")) for name, _, value in given):
        return problem
    group, _, last = key.rpartition(".")
    for name, text in files.items():
        if Path(name).parent.name in ("experiment", group) and re.search(rf"\b{re.escape(last)}\s*:", text):
            return f"{name}: {problem}"
    return problem


def _explain(error: Exception) -> str:
    """The problem behind an error of Hydra or OmegaConf, in words of this module where there are any."""
    cause = error.__cause__ or error
    lost = re.search(r"full_key: (\S+)", str(cause))
    owner = _mapping(lost[1]) if lost else None
    if owner is not None and lost is not None:
        entry = lost[1][len(owner.key) + 1 :]
        return f"{owner.key}: the chosen files give no {entry!r} to change; to add it: '++{owner.key}={{{entry}: ...}}'"
    extra = next((extra for name, extra in PLUGINS.items() if f"'{name}" in str(error)), "")
    if extra:
        return f"{str(error).splitlines()[0].rstrip('.')}; it needs the extra: pip install 'hodec[{extra}]'"
    if "value in defaults : bool" in str(cause):
        return "defaults of a settings file: true or false given, as YAML reads off, on, yes, no; quote it: 'off'"
    parts = [part.strip() for part in f"{error}\n{cause}".splitlines()]
    text = " ".join(dict.fromkeys(part for part in parts if part and not part.startswith(NOISE)))
    return f"{lost[1]}: {text}" if lost and isinstance(error, OmegaConfBaseException) else text
