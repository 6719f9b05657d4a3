"""What settings may not do unasked: choose what code runs. Hydra calls whatever a ``_target_`` names.

The command line is the user's own word; a file is often somebody else's, sent along with a result. ``--trust`` takes
its settings of Hydra as they are; ``--trust PACKAGE`` lets a ``_target_`` name what that package defines.
"""

import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import entry_points

from hodec.errors import ConfigError
from hodec.experiment.config.differences import differences

# How the flag reaches the further processes of a run, which Lightning starts by the same arguments without it: 1 for
# the flag alone, or names of packages.
FLAG, VARIABLE, EVERYTHING = "--trust", "HODEC_TRUST", "1"
PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

# All that a ``_target_`` among Hydra's settings may name: Hydra's own, its plugins, the samplers of Optuna and hodec's.
TARGETS = frozenset(
    {
        "hodec.experiment.report.sweep.SweepReport",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
        *(f"optuna.samplers.{name}Sampler" for name in ("Grid", "TPE", "Random", "CmaEs", "NSGAII", "MOTPE")),
    }
)
# What a ``_target_`` among the settings of a run may name without a flag: they change numbers and run nothing else.
OPEN = re.compile(r"torch\.optim\.(lr_scheduler\.)?[A-Z]\w*")

# Settings of Hydra that a file may change: where a run writes, what a sweep varies, and how many jobs run at once.
FREE = ("run.dir", "sweep.dir", "sweep.subdir", "sweeper.*", "launcher.n_jobs", "mode", "verbose")
# Among those, what runs code all the same: Optuna calls the one, and unpickles what its samplers keep in the other.
BARRED = ("sweeper.custom_search_space", "sweeper.storage")
# Hydra's notes of how a composition came about.
NOTES = ("runtime", "overrides", "job.override_dirname", "job.config_name", "job.id", "job.num")


def trusted() -> bool:
    """Whether the user has said that the settings files may run any code."""
    return os.environ.get(VARIABLE) == EVERYTHING


def packages() -> list[str]:
    """The packages that the user trusts by name."""
    given = os.environ.get(VARIABLE, "")
    return [] if given in ("", EVERYTHING) else given.split(",")


def flags() -> list[str]:
    """The flag as it was given, for a command that goes on with a run."""
    return [FLAG] if trusted() else [f"{FLAG}={','.join(packages())}"] if packages() else []


def take_flag(argv: list[str]) -> list[str]:
    """The arguments without ``--trust``, ``--trust PACKAGE`` and ``--trust=PACKAGE,..``, which are remembered.

    Raises:
        ConfigError: what is no name of a package.
    """
    left, rest, names = list(argv), list[str](), list[str]()
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        if not equals and left and _are_packages(left[0]):
            value = left.pop(0)
        if equals and not _are_packages(value):
            raise ConfigError(f"{FLAG}: {value!r} given; allowed: names of packages, {FLAG} my_package,other")
        names += value.split(",") if value else [EVERYTHING]
    if names:
        os.environ[VARIABLE] = EVERYTHING if EVERYTHING in names else ",".join(dict.fromkeys(names))
    return rest


def _are_packages(text: str) -> bool:
    return all(map(PACKAGE.fullmatch, text.split(",")))


def allows(name: str) -> bool:
    """Whether a dotted name may be called: what is open to all, of a package that is trusted, or of an entry point."""
    inside = any(name == package or name.startswith(f"{package}.") for package in packages())
    return trusted() or inside or is_open(name)


def is_open(name: str) -> bool:
    """Whether a dotted name needs no word of the user: torch's optimizers, and entry points of what is installed."""
    return OPEN.fullmatch(name) is not None or name in entry_targets("hodec.data").values()


@cache
def entry_targets(group: str) -> dict[str, str]:
    """Name of each entry point of a group -> the dotted name of what it offers; nothing is loaded."""
    return {point.name: point.value.replace(":", ".") for point in entry_points(group=group)}


def set_by_files(composed: Mapping[str, object], own: Mapping[str, object]) -> list[str]:
    """What settings files change in Hydra that could run code, one problem each.

    Args:
        composed: Hydra's settings, not resolved, with the files.
        own: the same without them.
    """
    changed = differences(own, composed, ignore=NOTES)
    return [
        f"hydra.{key}: set by a settings file, where it can run code or change what runs; allowed: {FLAG}, for files "
        "that you have read"
        for key in changed
        if not any(fnmatchcase(key, free) for free in FREE) or key in BARRED
    ]


def unknown_targets(tree: object, path: str = "hydra") -> Iterator[str]:
    """Each ``_target_`` below a node of Hydra's settings that may not be called, one problem each."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "_target_" and value not in TARGETS and not allows(str(value)):
                yield f"{path}.{key}: {refusal(value)}"
            yield from unknown_targets(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from unknown_targets(value, f"{path}[{index}]")


def refusal(name: object) -> str:
    """Why a dotted name is not called, and the way out."""
    package = str(name).partition(".")[0]
    return f"{name!r} given, code that hodec does not know; allowed: {FLAG} {package}, if you know it"
