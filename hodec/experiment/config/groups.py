"""GROUPS: what each group of settings offers, ``ranks=budget`` or ``trainer=gpu``. Nothing here imports torch.

A preset is an option with some of its values changed. ``conf/GROUP/PRESET.yaml`` is written from it; see ``write``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from hodec.admm.options import AdmmOff, AdmmOptions, AdmmPaper, AdmmProject
from hodec.errors import near_matches
from hodec.experiment.config import logger_options, options, own, trust
from hodec.experiment.data.options import DATA_SETS
from hodec.options import Option, Setting, Settings, settings_of
from hodec.ranks import RULES, get_rule, rule_names

# In the wheel the settings are part of this package; in a checkout they stand beside train.py.
PACKAGED = Path(__file__).parents[1] / "conf"
CONF = PACKAGED if PACKAGED.is_dir() else Path(__file__).resolve().parents[3] / "conf"


@dataclass(frozen=True)
class Preset:
    """An option as one file of ``conf/`` offers it.

    Attributes:
        values: settings that are not the constructor's defaults.
        doc: the first line of the file; by default that of the class.
        packaged: whether it is hodec's own; others come by the entry points of installed packages.
    """

    option: type[Settings]
    values: Mapping[str, object] = field(default_factory=dict)
    doc: str = ""
    packaged: bool = True

    def tree(self) -> dict[str, object]:
        """Its settings as Hydra gets them, ``name`` among them where there are several options to choose from."""
        name = {"name": self.option.name} if issubclass(self.option, Option) else {}
        return {**name, **{key: one.default for key, one in settings_of(self.option).items()}, **self.values}


def _presets(*kinds: type[Option]) -> dict[str, Preset]:
    return {kind.name: Preset(kind) for kind in kinds}


def _methods() -> dict[str, Preset]:
    """One preset for each method of ``hodec.methods``, which would import torch: its files are written from it."""
    found = {
        path.stem: Preset(options.method_settings(path.stem, uses_modes="\nn_modes:" in path.read_text("utf-8")))
        for path in sorted((CONF / "method").glob("*.yaml"))
        if path.stem != own.CustomMethod.name
    }
    if trust.entry_targets("hodec.methods"):  # which cannot be known without loading them, and torch with them
        from hodec.methods import METHODS

        found |= {
            name: Preset(own.settings_of_method(method), packaged=False)
            for name, method in METHODS.items()
            if name not in found
        }
    return found


def _rules() -> dict[str, Preset]:
    others = {name: Preset(get_rule(name), packaged=False) for name in rule_names() if name not in RULES}
    return _presets(*RULES.values()) | others


def _models() -> dict[str, Preset]:
    """The nets by name; the first is the default."""
    return {
        **{
            name: Preset(
                options.ModelSettings,
                {"name": name},
                f"The CIFAR ResNet of {name.removeprefix('resnet')} layers: 16, 32 and 64 channels.",
            )
            for name in options.CIFAR_RESNETS
        },
        "torchvision": Preset(
            options.ModelSettings,
            {"name": "resnet18", "source": "torchvision"},
            "Any classification net of torchvision, such as resnet50 or mobilenet_v2.",
        ),
        "timm": Preset(
            options.ModelSettings,
            {"name": "resnet18", "source": "timm"},
            "Any classification net of timm; needs the package: pip install timm.",
        ),
        **_presets(own.CustomModel),
        **{
            name: Preset(
                options.ModelSettings, {"name": name}, f"The net {target} of an installed package.", packaged=False
            )
            for name, target in trust.entry_targets("hodec.models").items()
        },
    }


def _data_modules() -> dict[str, Preset]:
    """The data modules that installed packages offer by an entry point of ``hodec.data``."""
    return {
        name: Preset(own.DataModule, {"_target_": target}, f"{target} of an installed package.", packaged=False)
        for name, target in trust.entry_targets("hodec.data").items()
    }


@cache
def groups() -> dict[str, dict[str, Preset]]:
    """Group -> preset -> what it is, in the order of ``conf/config.yaml``; the first is the default."""
    gpu = {"precision": "bf16-mixed", "channels_last": True}
    return {
        "model": _models(),
        "data": _presets(*DATA_SETS.values(), own.DataModule) | _data_modules(),
        "method": dict(sorted(_methods().items(), key=lambda item: item[0] != "tt")) | _presets(own.CustomMethod),
        "ranks": _rules() | _presets(own.CustomRule),
        "admm": _presets(AdmmOptions, AdmmPaper, AdmmProject, AdmmOff),
        "optimizer": _presets(
            options.SgdSettings,
            options.AdamWSettings,
            options.MuonSettings,
            options.ScaledGdSettings,
            own.CustomOptimizer,
        ),
        "trainer": {
            "default": Preset(options.TrainerSettings, doc="Whatever this machine has, in full precision."),
            "gpu": Preset(
                options.TrainerSettings, {"accelerator": "gpu", **gpu}, "One GPU, bfloat16 where it is safe."
            ),
            "cpu_bf16": Preset(options.TrainerSettings, {"accelerator": "cpu", **gpu}, "A CPU with bfloat16 units."),
        },
        "logger": _presets(
            logger_options.CsvSettings,
            logger_options.WandbSettings,
            logger_options.TensorBoardSettings,
            own.CustomLogger,
        ),
        "distill": {"": Preset(options.DistillSettings)},
    }


def kinds_of(group: str) -> dict[str, type[Settings]]:
    """The options of a group by name; a group with one kind of option has it under the empty name."""
    kinds = dict.fromkeys(preset.option for preset in groups()[group].values())
    return {kind.name if issubclass(kind, Option) else "": kind for kind in kinds}


def method_names() -> list[str]:
    """The methods that there are, without those that settings name by ``_target_``."""
    return [name for name, kind in kinds_of("method").items() if not issubclass(kind, own.Target)]


def default_option(group: str) -> Settings:
    """The option that is taken where nothing is given."""
    preset = next(iter(groups()[group].values()))
    return preset.option(**preset.values)


@cache
def settings_by_key() -> dict[str, dict[str, Setting]]:
    """Key among all settings, ``ranks.macs`` -> name of each option that has it -> the setting."""
    found = {name: {"": one} for name, one in settings_of(options.RunSettings).items()}
    for group in groups():
        for name, kind in kinds_of(group).items():
            for one in settings_of(kind).values():
                found.setdefault(one.key, {})[name] = one
    return found


def foreign(group: str, name: str, key: str) -> str:
    """Why the option ``name`` of a group does not have a setting: the options that have it, or those like it."""
    first = next(iter(groups()[group]))  # stands for the options that have no name
    owners = [f"{group}={owner or first}" for owner in settings_by_key().get(f"{group}.{key}", {})]
    if not owners:
        return unknown(f"{group}.{key}")
    have = "has it" if len(owners) == 1 else "have it"
    return f"{group}.{key}: {group}={name or first} has no such setting; {', '.join(owners)} {have}"


def has_setting(group: str, node: object, name: str) -> bool:
    """Whether the option that a node of plain settings chooses has a setting of that name."""
    kinds = kinds_of(group)
    chosen = node.get("name") if isinstance(node, Mapping) else None
    kind = kinds.get(str(chosen), kinds.get(""))
    return kind is not None and name in settings_of(kind)


def takes_arguments(group: str) -> bool:
    """Whether a group has an option of one's own, to which settings that are not known go as arguments."""
    return any(issubclass(kind, own.Target) for kind in kinds_of(group).values()) if group in groups() else False


def unknown(key: str) -> str:
    """A key that does not exist, with the keys that were perhaps meant."""

    def likeness(known: str) -> tuple[float, float]:
        """Of the last words or of the whole keys, whichever is more; then of the whole keys."""
        ends = SequenceMatcher(None, key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]).ratio()
        whole = SequenceMatcher(None, key, known).ratio()
        return max(ends, whole), ends + whole

    scores = {known: likeness(known) for known in [*groups(), *settings_by_key()]}
    close = sorted((known for known in scores if scores[known][0] >= 0.6), key=lambda known: -scores[known][1])[:3]
    hint = f"Did you mean: {', '.join(close)}?" if close else "All settings: --cfg job"
    return f"{key}: no such setting. {hint}"


def not_among(key: str, value: object, names: list[str]) -> str:
    """A name that is not among those there are, with the nearest of them."""
    return f"{key}: {value!r} given; allowed: {' | '.join(names)}.{near_matches(str(value), names)}"
