"""run(config): the phases in order, and nothing else.

Values only move forward: settings -> plan -> dense net -> factorized net -> metrics. The run folder keeps the result of
each finished phase, so that the same command goes on where a killed run was.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pytorch_lightning
import torch
import yaml
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn

from hodec._version import __version__
from hodec.errors import CheckpointError
from hodec.experiment import phases
from hodec.experiment.config.differences import differences
from hodec.experiment.config.own import CustomModel
from hodec.experiment.config.schema import Config, completed, to_yaml
from hodec.experiment.context import RunContext, check_machine, device_of
from hodec.experiment.data.images import build_data
from hodec.experiment.elastic import goes_on
from hodec.experiment.lock import held
from hodec.experiment.loggers import Loggers, loggers_of
from hodec.experiment.results import measure, spectra, summary
from hodec.experiment.run_folder import RunFolder, probe
from hodec.experiment.stage import extend, take_stage
from hodec.experiment.training import quiet_lightning, warn_of_slow_precision
from hodec.export import checkpoint
from hodec.io.atomic import NO_SPACE, JsonObject, remove_parts, write_json, write_text
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

# Settings that do not change what a run computes: they may differ when it is resumed.
FREE_SETTINGS = (
    "logger",
    "report",
    "objective",
    "macs_limit",
    "data.root",
    "data.num_workers",
    "data.download",
    "trainer.threads",
    "trainer.checkpoint_minutes",
)


def run(config: Config, run_dir: Path) -> JsonObject:
    """Train under ADMM, convert, retrain, evaluate, write the files of the run.

    Args:
        config: the settings; see ``conf/``.
        run_dir: its folder; a stopped run with the same settings goes on, a finished one is only read.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        HodecError: bad settings or data, broken files, training that broke down; one message each.
    """
    path = Path(run_dir)
    probe(path)
    with room(path), held(path) if is_first_process() else contextlib.nullcontext():
        if is_first_process():
            remove_parts(path)  # of a start that was killed while it wrote
        return _run(config, path)


def _run(config: Config, path: Path) -> JsonObject:
    folder = open_folder(config, path)
    if folder.done("evaluate"):
        log.info("this run is finished; results are in %s", folder.path)
        report(folder, config)  # where a run was killed while it wrote that, or did without until now
        metrics: JsonObject = folder.phases["evaluate"]["metrics"]
        return metrics
    check_machine(config)
    prepare(config)
    data = build_data(config.data)
    data.check()
    folder.check_begun({"data": data.identity(), "hodec": __version__, "torch": torch.__version__})
    with loggers_of(config, folder.path) if folder.writes else contextlib.nullcontext(Loggers()) as loggers:
        context = RunContext(config, data, folder, loggers, phases.rank_rule(config, data))
        return compute(context)


def compute(run: RunContext) -> JsonObject:
    """Return the metrics of a run, phase by phase; the run folder gives the results of those that are done."""
    nets, plan = train_nets(run)
    metrics = measure(run, nets)
    if run.folder.writes:
        finish(run, nets, plan, metrics=metrics)
    return metrics


def train_nets(run: RunContext) -> tuple[dict[str, nn.Module], Plan]:
    """Return the nets of a run by the names of ``metrics.json``, and the plan; nothing reads the test set."""
    config, start, teacher = run.config, phases.dense_net(run), phases.teacher_net(run)
    # A rule that reads weights waits for trained ones; every other plan is made now, so that mistakes show at once.
    waits = run.reads_weights and not config.init and run.pretrain_epochs > 0
    plan = None if waits else phases.make_plan(run, start)
    pretrained = phases.pretrain(run, start)
    plan = phases.make_plan(run, pretrained) if plan is None else plan
    trained = phases.train(run, pretrained, plan, teacher=teacher or pretrained)
    truncated = phases.compress(run, trained)
    best = teacher or (pretrained if run.trained_before else trained.net)
    compressed = phases.retrain(run, truncated, dense=trained.net, teacher=best)
    changed = run.pretrain_epochs or config.dense_epochs  # else the net that came trained is the dense net
    nets = {
        "teacher": teacher,
        "pretrained": pretrained if run.trained_before and changed else None,
        "dense": trained.net,
        "truncated": truncated,
        "compressed": compressed,
    }
    return {name: net for name, net in nets.items() if net is not None}, trained.plan


@contextlib.contextmanager
def room(folder: Path) -> Iterator[None]:
    """Within the block a full disk is one message, whatever was to be written: what is there stays whole.

    Raises:
        CheckpointError: there is no space left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise CheckpointError(
            f"{error.filename or folder} could not be written: there is no space left. Make room: the same command "
            f"goes on with the run in hydra.run.dir={folder}"
        ) from error


def open_folder(config: Config, path: Path) -> RunFolder:
    """Open the run folder, which is refused when it holds a run with other settings."""
    mine, stored = yaml.safe_load(to_yaml(config)), path / "config.yaml"
    theirs = mine
    if os.path.isfile(stored):  # not Path.is_file, which raises where a folder may not be read
        try:
            theirs = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(f"{stored} is not readable ({error}); give another hydra.run.dir=PATH") from error
    theirs = completed(theirs) if isinstance(theirs, dict) else {}
    keys, before = differences(theirs, mine, ignore=FREE_SETTINGS), theirs.get("retrain_epochs")
    longer = keys == ["retrain_epochs"] and type(before) is int and 0 < before < config.retrain_epochs
    longer = longer and not config.optimizer.joint_schedule  # by which ADMM has trained for the shorter one
    elastic = goes_on(keys, theirs, mine)
    folder = RunFolder.open(path, to_yaml(config), [] if longer or elastic else keys, writes=is_first_process())
    if longer:
        extend(folder, epochs=config.retrain_epochs, before=cast(int, before))
    if (longer or elastic) and folder.writes:
        write_text(stored, to_yaml(config))
    if config.init_stage:
        take_stage(folder, config.init_stage, mine, FREE_SETTINGS)
    return folder


def prepare(config: Config) -> None:
    """Set the threads, the random numbers and who speaks, before anything is built."""
    if not is_first_process():
        logging.getLogger("hodec").setLevel(logging.WARNING)  # the first of several processes says it all
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    if device_of(config).type == "cpu":
        warn_of_slow_precision(config)
    with quiet_lightning():
        pytorch_lightning.seed_everything(config.seed, workers=True, verbose=False)


def is_first_process() -> bool:
    """Return whether this is the process that writes files, of those that train together on several devices."""
    return not getattr(rank_zero_only, "rank", 0)


def finish(run: RunContext, nets: Mapping[str, nn.Module], plan: Plan, *, metrics: JsonObject) -> None:
    """Write what outlives the run: the compressed model, the numbers, the report and what it draws."""
    path, data = run.folder.path, run.data
    model = run.config.model
    facts = {
        # a file may not name code: a net of one's own is given when the model is loaded
        **({} if isinstance(model, CustomModel) else {"model": model.name}),
        "in_channels": data.in_channels,
        "num_classes": data.num_classes,
        "image_size": list(data.image_size),
    }
    checkpoint.save(nets["compressed"], path / "compressed.safetensors", plan, facts=facts)
    write_text(path / "spectra.json", json.dumps(spectra(nets["dense"], plan), separators=(",", ":")) + "\n")
    write_json(path / "metrics.json", metrics)
    run.loggers.log_results(metrics)
    run.folder.finish("evaluate", {"metrics": metrics})  # only now: a run that counts as finished has all its files
    report(run.folder, run.config, again=True)
    run.loggers.log_files(path)
    log.info("%s", summary(metrics))


def report(folder: RunFolder, config: Config, *, again: bool = False) -> None:
    """Write the report of a finished run, where it is asked for and has not been written, or is to be ``again``."""
    whole = folder.done("report") or all((folder.path / name).exists() for name in ("report.html", "report.md"))
    if config.report and folder.writes and (again or not whole):
        from hodec.experiment.report.render import write_report

        log.info("report: %s", write_report(folder.path))
        folder.finish("report", {})
