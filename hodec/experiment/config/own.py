"""Options that are code of one's own, chosen by a dotted name: ``model=custom model._target_=my_package.Net``.

What stands beside ``_target_`` and is no setting here goes to it as an argument: ``+model.width=32``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from hodec.errors import ConfigError, HodecError
from hodec.experiment.config import targets
from hodec.experiment.config.logger_options import LoggerSettings
from hodec.experiment.config.options import RETRAIN_LR, OptimizerSettings, method_settings
from hodec.experiment.config.targets import TARGET, WithTargets
from hodec.experiment.data.options import DataOption
from hodec.options import Option, Settings, argument, setting, settings_of, values_or_errors
from hodec.ranks.rule import RankRule

if TYPE_CHECKING:
    from hodec.methods import Method


def _target(what: str, example: str) -> Any:
    return setting("", what, words=targets.NAME_WORDS, example=f"my_package.{example}", check=targets.bad_name)


@dataclass(frozen=True, kw_only=True)
class Target(Option, WithTargets):
    """Something that is called by its dotted name.

    Attributes:
        offered: arguments that hodec adds where they are taken.
        places: positional arguments that hodec puts first.
        arguments: its own.
    """

    offered: ClassVar[tuple[str, ...]] = ()
    places: ClassVar[int] = 0

    _target_: str = _target("what is called", "Name")
    arguments: Mapping[str, object] | None = argument()

    def values(self) -> dict[str, Any]:
        return super().values() | dict(self.arguments or {})

    def node(self) -> dict[str, object]:
        """The name and its arguments, as Hydra calls them."""
        return {TARGET: self._target_, **(self.arguments or {})}

    def problems(self) -> Iterator[str]:
        yield from targets.problems(self.group, self.node(), self.offered, self.places)


@dataclass(frozen=True, kw_only=True)
class CustomModel(Target):
    """A net of your own: a class or a function that returns a torch.nn.Module.

    It gets in_channels, num_classes and image_size (pixels of a side) where it has such arguments.
    """

    group: ClassVar[str] = "model"
    name: ClassVar[str] = "custom"
    offered: ClassVar[tuple[str, ...]] = ("in_channels", "num_classes", "image_size")

    _target_: str = _target("class or function that makes the net", "Net")


@dataclass(frozen=True, kw_only=True)
class CustomOptimizer(Target, OptimizerSettings):
    """An optimizer of torch or of your own: parameters, lr and weight_decay come from here, the rest as arguments."""

    name: ClassVar[str] = "custom"
    places: ClassVar[int] = 1

    _target_: str = _target("class of the optimizer", "Optimizer")
    lr: float = setting(1e-3, "learning rate at its highest", above=0)
    retrain_lr: float | str | None = setting(None, **RETRAIN_LR)
    weight_decay: float | None = setting(None, "as the optimizer understands it; null: its own default", low=0)

    def torch_arguments(self) -> dict[str, object]:
        return dict(self.arguments or {})

    def problems(self) -> Iterator[str]:
        given = {"lr": self.lr} | ({} if self.weight_decay is None else {"weight_decay": self.weight_decay})
        yield from targets.problems(self.group, self.node() | given, places=self.places)
        yield from OptimizerSettings.problems(self)


@dataclass(frozen=True, kw_only=True)
class CustomLogger(Target, LoggerSettings):
    """A logger of Lightning's or of your own: log_metrics(metrics, step) and finalize(status).

    It gets the run folder where it has an argument folder or save_dir.
    """

    name: ClassVar[str] = "custom"
    offered: ClassVar[tuple[str, ...]] = ("folder", "save_dir")

    _target_: str = _target("class of the logger", "Logger")


@dataclass(frozen=True, kw_only=True)
class DataModule(Target, DataOption):
    """Your own images: a LightningDataModule, whose data sets yield pairs of a float tensor (C, H, W) and a label."""

    name: ClassVar[str] = "datamodule"
    reader: ClassVar[str] = "hodec.experiment.data.own:datamodule"

    _target_: str = _target("class of the data module", "Images")
    classes: int | None = setting(None, "their number; null: num_classes of the data module", low=2)


@dataclass(frozen=True, kw_only=True)
class CustomRule(Target):
    """A rank rule of your own: a subclass of hodec.ranks.RankRule, with its settings."""

    group: ClassVar[str] = "ranks"
    name: ClassVar[str] = "custom"

    _target_: str = _target("class of the rule", "Rule")


@dataclass(frozen=True, kw_only=True)
class CustomMethod(Target):
    """A method of your own: a hodec.methods.Method, with the settings of methods."""

    group: ClassVar[str] = "method"
    name: ClassVar[str] = "custom"

    _target_: str = _target("the method", "METHOD")


# Option made of a class of one's own -> the dotted name it was chosen by.
_CHOSEN: dict[type[Settings], str] = {}


def read_target(kind: type[Target], node: Mapping[str, object]) -> tuple[Settings | None, list[HodecError]]:
    """The option that a node with a ``_target_`` stands for, or all that is wrong with it.

    Rules and methods of one's own become options of their own kind; the other options keep name and arguments.
    """
    settings = settings_of(kind)
    known = {key: value for key, value in node.items() if key in settings}
    own = {key: value for key, value in node.items() if key not in settings}
    option, errors = values_or_errors(kind, known)
    if option is None or issubclass(kind, CustomRule | CustomMethod):
        return (None, errors) if option is None else _native(cast(Target, option), own)
    made = replace(cast(Target, option), arguments=own)
    return made, [ConfigError(text) for text in made.problems()]


def _native(chosen: Target, given: dict[str, object]) -> tuple[Settings | None, list[HodecError]]:
    """The option of a rule's own class, or of a method."""
    key, name = f"{chosen.group}.{TARGET}", chosen._target_
    try:
        kind = (_rule if isinstance(chosen, CustomRule) else _method)(name)
    except HodecError as error:
        return None, [ConfigError(f"{key}: {error}")]
    wrong = targets.wrong_arguments(chosen.group, kind, list(given))
    if errors := [ConfigError(text) for text in wrong]:
        return None, list(errors)
    _CHOSEN[kind] = name
    return values_or_errors(kind, given)


def _rule(name: str) -> type[Settings]:
    rule = targets.load(name)
    if not (isinstance(rule, type) and issubclass(rule, RankRule)):
        raise ConfigError(f"{name!r} given; allowed: a subclass of hodec.ranks.RankRule")
    return rule


def _method(name: str) -> type[Settings]:
    from hodec.methods import METHODS, Method, register

    method = targets.load(name)
    if not isinstance(method, Method):
        raise ConfigError(f"{name!r} given; allowed: a hodec.methods.Method")
    if METHODS.get(method.name) is not method:
        register(method)
    return settings_of_method(method)


def settings_of_method(method: "Method") -> type[Settings]:
    """The settings of a method that has no file in ``conf/``."""
    splits = any(layer.format.uses_modes for layer in method.layers.values())
    return method_settings(method.name, uses_modes=splits)


def named(option: Settings) -> dict[str, object]:
    """What chooses an option, as the settings of a run hold it: its name, and the dotted name where it has one."""
    if type(option) in _CHOSEN:
        return {"name": "custom", TARGET: _CHOSEN[type(option)]}
    return {"name": option.name} if isinstance(option, Option) else {}
