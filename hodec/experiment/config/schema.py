"""The settings of a run as one object, read from plain values and written as YAML. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hodec.admm.options import AdmmOff, AdmmOptions, AdmmProject
from hodec.errors import ConfigError, HodecError, Use
from hodec.experiment.config.groups import default_option, foreign, groups, kinds_of, method_names, not_among, unknown
from hodec.experiment.config.options import (
    AdamWSettings,
    DistillSettings,
    MethodSettings,
    ModelSettings,
    ModesMethodSettings,
    MuonSettings,
    RunSettings,
    ScaledGdSettings,
    SgdSettings,
    TrainerSettings,
)
from hodec.experiment.config.own import CustomModel, CustomOptimizer, Target, named, read_target
from hodec.experiment.config.targets import WithTargets
from hodec.experiment.data.options import DataOption
from hodec.experiment.redaction import redacted
from hodec.options import Option, Settings, settings_of, values_or_errors
from hodec.ranks import RankRule


def _section(group: str) -> Any:
    return field(default_factory=partial(default_option, group), metadata={"python_only": True})


@dataclass(frozen=True)
class Config(RunSettings):
    """All settings of one run; the defaults are those of a plain ``python train.py``.

    Raises:
        ConfigError: settings that do not go together, all of them in one message.
    """

    model: ModelSettings | CustomModel = _section("model")
    data: DataOption = _section("data")
    method: MethodSettings | ModesMethodSettings = _section("method")
    ranks: RankRule = _section("ranks")
    admm: AdmmOptions | AdmmProject | AdmmOff = _section("admm")
    optimizer: SgdSettings | AdamWSettings | MuonSettings | ScaledGdSettings | CustomOptimizer = _section("optimizer")
    distill: DistillSettings = _section("distill")
    trainer: TrainerSettings = _section("trainer")
    logger: Option = _section("logger")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse([text for wrong, text in COMBINATIONS if wrong(self)])

    @property
    def uses_admm(self) -> bool:
        """Whether the dense net is trained under ADMM."""
        return not isinstance(self.admm, AdmmOff) and self.dense_epochs > 0

    @property
    def pretraining(self) -> int:
        """Epochs without ADMM; a rule that reads weights gets as many as ADMM when it would get none at all."""
        implied = self.ranks.reads_weights and not self.plan and not self.init
        return self.pretrain_epochs or (self.dense_epochs if implied else 0)

    @property
    def methods(self) -> list[str]:
        """The methods that a layer may take: those among which the rule chooses, or the one of ``method``."""
        return list(getattr(self.ranks, "methods", None) or [self.method.name])

    def to_dict(self) -> dict[str, object]:
        """All settings as plain values, as ``config.yaml`` of a run holds them."""
        tree: dict[str, object] = self.values()
        for group in groups():
            option: Settings = getattr(self, group)
            tree[group] = named(option) | option.values()
        return tree


COMBINATIONS: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (
        lambda c: c.tt_ranks is not None and c.ranks.name != "manual",
        "tt_ranks: given together with another rule than manual; allowed: ranks=manual, or tt_ranks=null",
    ),
    (
        lambda c: c.ranks.name == "learned" and not c.plan and not (c.uses_admm and isinstance(c.admm, AdmmOptions)),
        "ranks: learned given without ADMM, which learns them; allowed: dense_epochs from 1 and admm=default, or "
        "ranks=budget",
    ),
    (
        lambda c: not set(c.methods) <= {*method_names(), c.method.name},
        "ranks.methods: a name that is no method; allowed: methods among " + " | ".join(method_names()),
    ),
    (
        lambda c: (
            bool(c.calibration_batches) and c.uses_admm and not c.plan and not {"cp", "cp3"}.isdisjoint(c.methods)
        ),
        "calibration_batches: given with cp or cp3 under ADMM, which projects them by iteration; "
        "allowed: calibration_batches=0, admm=off, or another method",
    ),
    (
        lambda c: bool(c.distill.features) and (c.distill.init is not None or c.trainer.compile),
        "distill.features: given with another net that teaches or with trainer.compile; allowed: distill.init=null, "
        "whose layers are those of the factorized net, and trainer.compile=false",
    ),
    (
        lambda c: c.fade_epochs > c.retrain_epochs,
        "fade_epochs: more given than retrain_epochs, which begin with them; allowed: as many at most, or 0",
    ),
    (
        lambda c: bool(c.fade_epochs) and c.trainer.compile,
        "fade_epochs: given with trainer.compile, which would compile each step anew; allowed: fade_epochs=0 or "
        "trainer.compile=false",
    ),
    (
        lambda c: c.optimizer.retrain_lr == "auto" and c.optimizer.joint_schedule,
        "optimizer.retrain_lr: auto given with optimizer.joint_schedule=true, where it is a part of lr's; "
        "allowed: optimizer.joint_schedule=false, or a number",
    ),
    (
        lambda c: c.optimizer.retrain_lr == "auto" and c.trainer.devices * c.trainer.num_nodes > 1,
        "optimizer.retrain_lr: auto given with several devices, which could each find another; "
        "allowed: trainer.devices=1 with trainer.num_nodes=1, or a number",
    ),
    (
        lambda c: c.distill.dense and not (c.distill.weight and (c.init or c.pretrain_epochs or c.distill.init)),
        "distill.dense: true given, but nothing teaches the dense net; allowed: distill.weight above 0 together with a "
        "trained net, init=FILE, pretrain_epochs=30 or distill.init=FILE",
    ),
)


def read_config(tree: Mapping[str, object]) -> tuple[Config | None, list[HodecError]]:
    """The settings that plain values stand for, or all that is wrong with them."""
    top, given, errors = settings_of(RunSettings), dict[str, Any](), list[HodecError]()
    for key, value in tree.items():
        if key in groups():
            given[key], found = _read_group(key, value)
            errors += found
        elif key in top:
            given[key] = value
            errors += top[key].errors(value)
        else:
            errors.append(ConfigError(unknown(key)))
    if errors:
        return None, errors
    try:
        return Config(**given), []
    except HodecError as error:
        return None, [error]


def _read_group(group: str, node: object) -> tuple[Settings | None, list[HodecError]]:
    kinds = kinds_of(group)
    if not isinstance(node, Mapping):
        return None, [ConfigError(not_among(group, node, list(groups()[group])))]
    name = node.get("name", next(iter(kinds)))
    if "" in kinds and (not isinstance(name, str) or name not in kinds):
        name = ""  # of an option without a name, which may have a setting of that name
    if not isinstance(name, str) or name not in kinds:
        return None, [ConfigError(not_among(f"{group}.name", name, list(kinds)))]
    kind, settings = kinds[name], settings_of(kinds[name])
    given = {str(key): value for key, value in node.items() if key != "name" or not name}
    if issubclass(kind, Target):
        return read_target(kind, given)
    wrong: list[HodecError] = [ConfigError(foreign(group, name, key)) for key in given if key not in settings]
    option, errors = values_or_errors(kind, {key: one for key, one in given.items() if key in settings})
    if isinstance(option, WithTargets):
        errors += [ConfigError(text) for text in option.problems()]
    return option, wrong + errors


def config_of(tree: Mapping[str, object]) -> Config:
    """The settings that plain values stand for: those of a run's ``config.yaml``, or what Hydra composed.

    Raises:
        ConfigError: all that is wrong with them.
    """
    config, errors = read_config(tree)
    refuse([error.told(Use.in_hydra) for error in errors])
    if config is None:
        raise ConfigError("there are no settings")
    return config


def completed(stored: Mapping[str, object]) -> dict[str, object]:
    """Stored settings of a run, where those that did not exist when it began have their defaults."""
    tree = {**Config().to_dict(), **stored}
    for group in groups():
        node = tree[group]
        if isinstance(node, dict) and (kind := kinds_of(group).get(node.get("name", ""))):
            tree[group] = {key: one.default for key, one in settings_of(kind).items()} | node
    return tree


def to_yaml(config: Config) -> str:
    """The settings as YAML text, in the order of the classes."""
    import yaml

    text: str = yaml.safe_dump(redacted(config.to_dict()), sort_keys=False, allow_unicode=True, width=10**6)
    return text


def refuse(problems: Sequence[str]) -> None:
    """Raise one ConfigError that lists `problems`, each once; do nothing when there are none."""
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        raise ConfigError(unique[0])
    if unique:
        raise ConfigError("\n  ".join([f"{len(unique)} problems in the settings:", *unique]))
