"""The file of a comparison: its arms, what each of them may choose from, and the seeds."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from hodec.errors import ConfigError, HodecError, Use, near_matches
from hodec.experiment.config.groups import CONF
from hodec.experiment.config.overrides import check_overrides, plain
from hodec.experiment.config.schema import Config, config_of
from hodec.io.atomic import JsonObject

KEYS = ("settings", "seeds", "base", "arms")
# What all arms have to have in common for a comparison to be one: images, start, teacher.
COMMON = ("data", "model", "init", "pretrain_epochs")


@dataclass(frozen=True)
class Candidate:
    """One choice of what an arm may choose from.

    Attributes:
        arm: its name.
        chosen: the values of what is swept, as overrides; empty where nothing is.
        config: all settings; of the first seed.
    """

    arm: str
    chosen: tuple[str, ...]
    config: Config

    def seeded(self, seed: int) -> Config:
        """The settings with another seed."""
        return replace(self.config, seed=seed)

    def folder(self, seed: int) -> Path:
        """Where its run is kept, relative to the folder of the comparison."""
        name = "_".join([*(re.sub(r"[^\w.]+", "-", one) for one in self.chosen), f"seed-{seed}"])
        return Path(re.sub(r"\W+", "-", self.arm), name)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        base: the arm that the others are compared to.
        seeds: of each arm; the choices are made by the first.
        arms: name -> its candidates.
    """

    base: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Sequence[Candidate]]


def read_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read the file of a comparison, YAML with ``settings``, ``seeds``, ``base`` and ``arms``.

    Args:
        path: the file.
        overrides: settings of all arms that win over those of the file.

    Raises:
        ConfigError: the file is none of a comparison, a setting is wrong, or the arms differ in more than how they
            train: in images, start, or number of steps.
    """
    content = _content(path)
    arms = {}
    for name, own in content["arms"].items():
        lines = _merged(content["settings"], own, overrides)
        try:
            arms[str(name)] = list(_candidates(str(name), lines, content["seeds"][0]))
        except HodecError as error:
            raise ConfigError(f"{path}, arm {name!r}: {error.told(Use.in_hydra)}") from error
    check_alike(path, arms)
    return Comparison(str(content["base"]), tuple(content["seeds"]), arms)


def _content(path: Path) -> JsonObject:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    content = {"settings": [], **content} if isinstance(content, dict) else {}
    if set(content) != set(KEYS):
        raise ConfigError(f"{path} is no comparison: it has to have {', '.join(KEYS)}, and nothing else")
    seeds, arms, base = content["seeds"], content["arms"], content["base"]
    if not isinstance(arms, dict) or not all(map(_are_lines, (content["settings"], *arms.values()))):
        raise ConfigError(f"{path}: arms: allowed: NAME: [SETTING=VALUE, ..] for each; settings is such a list too")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"{path}: seeds: {seeds!r} given; allowed: a list of whole numbers from 0")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: seeds: {seeds!r} given; allowed: each once, as equal seeds make equal runs")
    if base not in arms:
        raise ConfigError(f"{path}: base: {base!r} given; allowed: an arm.{near_matches(str(base), [*arms])}")
    return content


def _are_lines(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) and "=" in line for line in value)


def _merged(*sources: Sequence[str]) -> list[str]:
    """The settings of several lists, each key once; the last one wins."""
    merged = {line.partition("=")[0].lstrip("+"): line for lines in sources for line in lines}
    barred = [key for key in merged if key == "seed" or key.startswith("hydra")]
    if barred:
        raise ConfigError(f"{barred[0]}: given in a comparison, which has seeds and folders of its own; leave it out")
    return list(merged.values())


def _candidates(arm: str, lines: Sequence[str], seed: int) -> Iterator[Candidate]:
    given = [one for line in lines for one in _parsed(line)]
    swept = [list(_values(one)) for one in given if one.is_sweep_override()]
    fixed = [str(one.input_line) for one in given if not one.is_sweep_override()]
    check_overrides([*fixed, *(values[0] for values in swept)], CONF)  # the others are read below
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for chosen in itertools.product(*swept):
            tree = plain(compose("config", overrides=[*fixed, *chosen, f"seed={seed}"]))
            yield Candidate(arm, chosen, config_of(tree))


def _parsed(line: str) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides([line])
    except HydraException:
        check_overrides(["-m", line], CONF)  # it has better words for what is wrong
        raise


def _values(override: Override) -> Iterator[str]:
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: an interval given; allowed: values, {override.key_or_group}=A,B")
    for value in override.sweep_string_iterator():
        yield f"{override.get_key_element()}={value}"


def check_alike(path: Path, arms: Mapping[str, Sequence[Candidate]]) -> None:
    """Refuse arms that differ in images, start or number of steps.

    Raises:
        ConfigError: naming two of them; or one of several devices.
    """
    everyone = [one for candidates in arms.values() for one in candidates]
    first = everyone[0]
    for one in everyone:
        for setting in ("devices", "num_nodes"):
            if (count := getattr(one.config.trainer, setting)) > 1:
                raise ConfigError(f"{path}: trainer.{setting}: {count} given; allowed in a comparison: 1")
        for key in COMMON:
            if getattr(one.config, key) != getattr(first.config, key):
                raise ConfigError(f"{path}: the arms {first.arm!r} and {one.arm!r} differ in {key}; allowed: one {key}")
        if epochs(one.config) != epochs(first.config):
            raise ConfigError(
                f"{path}: dense_epochs + retrain_epochs is {epochs(first.config)} in arm {first.arm!r} and "
                f"{epochs(one.config)} in arm {one.arm!r}; allowed: the same number of steps"
            )


def epochs(config: Config) -> int:
    """Epochs of an arm after the start that all have in common."""
    return config.dense_epochs + config.retrain_epochs
