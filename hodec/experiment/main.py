"""The experiment from the command line: train under ADMM, convert, retrain, report."""

import contextlib
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hodec.errors import ConfigError, HodecError, Use
from hodec.experiment.config.arguments import composing, given, remember
from hodec.experiment.config.groups import CONF, groups
from hodec.experiment.config.objectives import names_of, value_of
from hodec.experiment.config.overrides import check_overrides, plain
from hodec.experiment.config.schema import Config, config_of
from hodec.experiment.config.sweep_names import job_folder
from hodec.experiment.config.trust import flags, take_flag
from hodec.experiment.redaction import clean_record, command
from hodec.experiment.signals import Stopped, stoppable

log = logging.getLogger("hodec")

started: list[str] = []  # folders of the jobs that came so far as to run


# At import, not in a function: the workers of a parallel launcher import this module and call run_job alone.
OmegaConf.register_new_resolver("hodec.job_folder", job_folder, replace=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_job(cfg: DictConfig) -> float | list[float] | None:
    """Run one job and return its ``objective`` for sweepers, by default the validation accuracy, 0..1.

    Several objectives are a list; None stands for one that the run has not measured.
    """
    job = HydraConfig.get()
    started.append(job.runtime.output_dir)
    clean_record(job)
    failure = Path(job.runtime.output_dir, "error.txt")  # the report of the sweep reads it
    with contextlib.suppress(OSError):
        failure.unlink(missing_ok=True)
    try:
        from hodec.experiment.pipeline import run  # here: mistakes in the settings show before torch is imported

        config = config_of(plain(cfg))
        with stoppable():
            if "direction" in job.sweeper:
                check_validation(config)
            result = run(config, Path(job.runtime.output_dir))
    except Stopped as stop:
        log.warning("%s; go on with: %s", stop, resume_command(job))
        raise
    except Exception as error:
        known = isinstance(error, HodecError)
        log.error("%s: %s", type(error).__name__, in_words(error), exc_info=not known)
        if job.mode is RunMode.MULTIRUN:
            with contextlib.suppress(OSError):  # the error itself is news, not that it could not be written
                failure.write_text(f"{type(error).__name__}: {in_words(error)}\n", encoding="utf-8")
            raise  # this job has failed; the others of the sweep go on
        sys.exit(2 if known else 1)
    values = value_of(result, config.objective, config.macs_limit)
    return values[0] if values and len(values) == 1 else values


def check_validation(config: Config) -> None:
    """Refuse to optimise an accuracy that the run cannot measure: the test set is not there to choose by.

    Raises:
        ConfigError: there is no validation split.
    """
    from hodec.experiment.data.images import build_data

    if "validation_accuracy" in names_of(config.objective) and not build_data(config.data).has_validation:
        raise ConfigError(
            "{objective}: 'validation_accuracy' given without a validation split; allowed: {split}",
            objective=Use("objective"),
            split=Use("data.val_fraction", 0.1),
        )


def main() -> None:
    """Run the command line's job, or its sweep; exit code 2 for what the user can mend, 1 for what he cannot."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the lines below as they are
    try:
        store_presets()
        sys.argv[1:] = take_flag(sys.argv[1:])
        remember()
        check_overrides(sys.argv[1:], CONF)
        run_job()
    except HodecError as error:
        _refuse(f"{type(error).__name__}: {in_words(error)}")
    except KeyboardInterrupt:  # before the run has begun
        print("stopped by SIGINT before the run began", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # nobody reads the help any more: `| head`
        sys.stdout = None  # its flush at the end would complain once more
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if launcher := launcher_of(error):
            _refuse(
                f"ConfigError: the jobs of the sweep could not be started or waited for, {launcher}: "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Check hydra.launcher.* in --cfg hydra, or take "
                "another hydra/launcher; finished runs stay, and the same command with its hydra.sweep.dir=PATH goes on"
            )
        if started or not isinstance(error, OSError):
            raise  # of a job of a sweep; otherwise Hydra could not make the folder for the first one
        _refuse(f"ConfigError: the run folder cannot be written ({error}); give another: hydra.run.dir=PATH")


def launcher_of(error: Exception) -> str:
    """The plugin that an error of a launcher came from, "" for any other: those of jobs are raised after it is done."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "launch")
    folders = (Path(code.co_filename).parent for code in frames)
    return next((folder.name for folder in folders if folder.parent.name == "hydra_plugins"), "")


def resume_command(job: HydraConf) -> str:
    """The command that goes on with a job: its own arguments, and its folder; of a sweep what the job is made of."""
    words = given()[1:]
    if job.mode is RunMode.MULTIRUN:
        words = [*composing(words), *job.overrides.task]
    words = [word for word in words if not word.lstrip("+").startswith("hydra.run.dir=")]
    return command([*flags(), *words, f"hydra.run.dir={job.runtime.output_dir}"])


def store_presets() -> None:
    """Offer Hydra the presets that have no file in ``conf/``: those of other packages."""
    for group, presets in groups().items():
        for name, preset in presets.items():
            if name and not (CONF / group / f"{name}.yaml").exists():
                ConfigStore.instance().store(name, preset.tree(), group=group)


def in_words(error: Exception) -> str:
    """The message of an error, its settings as overrides."""
    return error.told(Use.in_hydra) if isinstance(error, HodecError) else str(error)


def _refuse(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(2)
