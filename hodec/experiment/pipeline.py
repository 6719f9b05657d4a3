"""run(config): the phases in order, and nothing else.

Objects only move forward: settings -> plan -> dense net -> factorized net -> files. Each finished phase leaves its
weights in the run folder, so that the same command goes on where a killed run was.
"""

import logging
import os
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
import yaml
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from hodec.errors import CheckpointError
from hodec.experiment.config.schema import Config, completed, differences, to_yaml
from hodec.experiment.data import build_data
from hodec.experiment.loggers import NoLogger, make_logger
from hodec.experiment.phases import Phases, device_of
from hodec.experiment.run_folder import RunFolder
from hodec.experiment.training import quiet_lightning, warn_of_slow_precision
from hodec.export import checkpoint
from hodec.io.atomic import write_json

log = logging.getLogger(__name__)

# Settings that do not change what a run computes: they may differ when it is resumed.
FREE_SETTINGS = ("logger", "report", "data.root", "data.num_workers", "data.download", "trainer.threads")


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Train under ADMM, convert, retrain, evaluate, write the files of the run.

    Args:
        config: the settings; see ``conf/``.
        run_dir: its folder; a stopped run with the same settings goes on, a finished one is only read.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        HodecError: bad settings or data, broken files, training that broke down; one message each.
    """
    folder = open_folder(config, Path(run_dir))
    if folder.done("evaluate"):
        log.info("this run is finished; results are in %s", folder.path)
        return folder.phases["evaluate"]["metrics"]
    prepare(config)
    data = build_data(config.data)
    data.check()
    phases = Phases(config, folder, data)
    curves = make_logger(config, folder.path, config.to_dict(), folder.path.name) if folder.writes else NoLogger()
    failed = True
    try:
        phases.plan_before_training()
        phases.pretrain(curves)
        phases.plan_after_training()
        phases.train_dense(curves)
        phases.convert()
        phases.retrain(curves)
        metrics = phases.evaluate()
        failed = False
    finally:
        curves.close(int(failed))
    if folder.writes:
        finish(config, folder, phases, metrics)
    return metrics


def open_folder(config: Config, path: Path) -> RunFolder:
    """The run folder, refused when it holds a run with other settings."""
    mine, stored = yaml.safe_load(to_yaml(config)), path / "config.yaml"
    theirs = mine
    if os.path.isfile(stored):  # not Path.is_file, which raises where a folder may not be read
        try:
            theirs = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"{stored} is not readable ({error}); give another hydra.run.dir=PATH") from error
    keys = differences(completed(theirs) if isinstance(theirs, dict) else {}, mine, ignore=FREE_SETTINGS)
    return RunFolder.open(path, to_yaml(config), keys, writes=is_first_process())


def prepare(config: Config) -> None:
    """Threads, random numbers and who speaks, before anything is built."""
    if not is_first_process():
        logging.getLogger("hodec").setLevel(logging.WARNING)  # the first of several processes says it all
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    if device_of(config).type == "cpu":
        warn_of_slow_precision(config)
    with quiet_lightning():
        pytorch_lightning.seed_everything(config.seed, workers=True, verbose=False)


def is_first_process() -> bool:
    """Whether this is the process that writes files, of those that train together on several devices."""
    return not getattr(rank_zero_only, "rank", 0)


def finish(config: Config, folder: RunFolder, phases: Phases, metrics: dict[str, Any]) -> None:
    """Write what outlives the run: the compressed model, the numbers, the report."""
    if phases.small is None:
        raise RuntimeError("nothing has been converted yet")
    facts = {
        "model": config.model.name,
        "in_channels": phases.data.in_channels,
        "num_classes": phases.data.num_classes,
        "image_size": list(phases.data.image_size),
    }
    checkpoint.save(phases.small, folder.path / "compressed.safetensors", phases.planned(), facts=facts)
    write_json(folder.path / "metrics.json", metrics)
    folder.finish("evaluate", metrics=metrics)  # only now: a run that counts as finished has all its files
    if config.report:
        from hodec.experiment.report.render import write_report

        log.info("report: %s", write_report(folder.path))
    log.info("%s", summary(metrics))


def summary(metrics: dict[str, Any]) -> str:
    """The result in one line."""
    cut = metrics["reduction"]
    nets = [name for name in ("pretrained", "dense", "truncated", "compressed") if name in metrics]
    scores = ", ".join(f"{name} {metrics[name]['test_accuracy']:.2%}" for name in nets)
    return f"{cut['params']:.1%} fewer parameters, {cut['macs']:.1%} fewer MACs; test accuracy: {scores}"
