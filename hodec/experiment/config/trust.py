"""What a settings file may not do unasked: choose what code runs. Hydra calls whatever a ``_target_`` names.

The command line is the user's own word; a file is often somebody else's, sent along with a result. ``--trust`` takes
its settings of Hydra as they are.
"""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from hodec.experiment.config.schema import differences

# How the flag reaches the further processes of a run, which Lightning starts by the same arguments without it.
FLAG, VARIABLE = "--trust", "HODEC_TRUST"

# All that a ``_target_`` among the settings may name: Hydra's own, its plugins, the samplers of Optuna and hodec's.
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

# Settings of Hydra that a file may change: where a run writes, what a sweep varies, and how many jobs run at once.
FREE = ("run.dir", "sweep.dir", "sweep.subdir", "sweeper.*", "launcher.n_jobs", "mode", "verbose")
# Among those, what runs code all the same: Optuna calls the one, and unpickles what its samplers keep in the other.
BARRED = ("sweeper.custom_search_space", "sweeper.storage")
# Hydra's notes of how a composition came about.
NOTES = ("runtime", "overrides", "job.override_dirname", "job.config_name", "job.id", "job.num")


def trusted() -> bool:
    """Whether the user has said that the settings files may run code."""
    return os.environ.get(VARIABLE) == "1"


def take_flag(argv: list[str]) -> list[str]:
    """The arguments without ``--trust``, which is remembered."""
    if FLAG in argv:
        os.environ[VARIABLE] = "1"
    return [word for word in argv if word != FLAG]


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
    """Each ``_target_`` below a node of the settings that is not among ``TARGETS``, one problem each."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "_target_" and value not in TARGETS:
                yield f"{path}.{key}: {value!r} given, code that hodec does not know; allowed: {FLAG}, if you know it"
            yield from unknown_targets(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from unknown_targets(value, f"{path}[{index}]")
