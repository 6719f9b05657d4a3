"""run(config): the stages in order, and nothing else.

Objects only move forward: settings -> plan -> dense net -> factorized net -> files. Each finished stage leaves its
weights in the run folder, so that the same command goes on where a killed run was.
"""

import logging
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
import yaml
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

import hodec
from hodec.admm.callback import AdmmCallback
from hodec.config import Config, differences, refuse, to_yaml, validate
from hodec.conversion import conversion_errors, convert, reestimate_batchnorm
from hodec.cost.count import count_cost
from hodec.data import ImageData, build_data, test_loader, train_loader
from hodec.errors import CheckpointError, PlanError
from hodec.export import checkpoint
from hodec.files import write_json
from hodec.formats.modes import Modes
from hodec.lit import LitClassifier, evaluate
from hodec.loggers import CurveLogger, NoLogger, make_logger
from hodec.models import build_model, load_weights
from hodec.plan import Plan
from hodec.ranks import RULES, RankRule, build_rule, make_plan
from hodec.run_folder import RunFolder
from hodec.training import fit_stage, quiet_lightning

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
    refuse(validate(config))
    folder = open_folder(config, Path(run_dir))
    if folder.done("evaluate"):
        log.info("this run is finished; results are in %s", folder.path)
        return folder.stages["evaluate"]["metrics"]
    prepare(config)
    data = build_data(config.data)
    data.check()
    work = Work(config, folder, data)
    curves = make_logger(config, folder.path, asdict(config), folder.path.name) if folder.writes else NoLogger()
    failed = True
    try:
        work.plan_before_training()
        work.pretrain(curves)
        work.plan_after_training()
        work.train_dense(curves)
        work.convert()
        work.retrain(curves)
        metrics = work.evaluate()
        failed = False
    finally:
        curves.close(int(failed))
    if folder.writes:
        finish(config, folder, work, metrics)
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
    keys = differences(theirs if isinstance(theirs, dict) else {}, mine, ignore=FREE_SETTINGS)
    return RunFolder.open(path, to_yaml(config), keys, writes=is_first_process())


def prepare(config: Config) -> None:
    """Threads, random numbers and who speaks, before anything is built."""
    if not is_first_process():
        logging.getLogger("hodec").setLevel(logging.WARNING)  # the first of several processes says it all
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    with quiet_lightning():
        pytorch_lightning.seed_everything(config.seed, workers=True, verbose=False)


def is_first_process() -> bool:
    """Whether this is the process that writes files, of those that train together on several devices."""
    return not getattr(rank_zero_only, "rank", 0)


def device_of(config: Config) -> torch.device:
    """Where the pipeline itself computes: the GPU when training uses one."""
    wanted = config.trainer.accelerator
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class Work:
    """The run under way: the nets as they stand after the latest stage, and the plan.

    Attributes:
        dense: the dense net; its weights are those of the latest stage that trained it.
        teacher: the dense net before ADMM, if it was trained by then.
        small: the factorized net, from ``convert`` on.
    """

    def __init__(self, config: Config, folder: RunFolder, data: ImageData) -> None:
        self.config, self.folder, self.data = config, folder, data
        self.device = device_of(config)
        self.example = torch.zeros(1, data.in_channels, *data.image_size)
        self.dense = self.skeleton()
        if config.init:
            load_weights(self.dense, config.init)
        self.trained = config.init is not None
        self.teacher: nn.Module | None = None
        self.plan: Plan | None = None
        self.small: nn.Module | None = None
        self.epochs = 0

    def skeleton(self) -> nn.Module:
        """The dense net with fresh weights."""
        data, name = self.data, self.config.model.name
        return build_model(
            name, in_channels=data.in_channels, num_classes=data.num_classes, image_size=min(data.image_size)
        )

    # -- plan ----------------------------------------------------------------------------------------------------

    def plan_before_training(self) -> None:
        """Plan now, unless the rule reads trained weights and there are none yet: mistakes show at once."""
        if self.trained or not self.config.pretrain_epochs or not self.rule().reads_weights:
            self.make_plan()

    def plan_after_training(self) -> None:
        """Plan from the trained weights, if that was waited for."""
        if self.plan is None:
            self.make_plan()

    def rule(self) -> RankRule:
        """The rank rule that the settings ask for."""
        settings = self.config.ranks
        value = self.config.tt_ranks if self.config.tt_ranks is not None else settings.default
        return build_rule(RULES, settings.rule, {"tt_ranks": value})

    def make_plan(self) -> None:
        """Read the plan of a stopped run or the one given, else make it; show and save it."""
        path, config = self.folder.path / "plan.json", self.config
        if self.folder.done("plan"):
            self.plan = Plan.load(path)
            return
        if config.plan:
            self.plan = Plan.load(config.plan)
            if not self.plan:
                raise PlanError(f"plan={config.plan} has no layers to factorize; with plan=null one is made")
        else:
            given = {g: Modes(tuple(m["in"]), tuple(m["out"])) for g, m in (config.method.modes or {}).items()}
            self.plan = make_plan(
                self.dense,
                self.rule(),
                method=config.method.name,
                example_input=self.example,
                include=config.include,
                exclude=config.exclude,
                n_modes=config.method.n_modes,
                modes=given,
                execution=config.method.execution,
            )
        log.info("the plan, before any training:\n%s", self.plan)
        convert(self.dense, self.plan, decompose=False)  # what cannot be swapped shows now, not after hours
        if self.folder.writes:
            self.plan.save(path)
        self.folder.finish("plan")

    def planned(self) -> Plan:
        """The plan, which every stage after planning has."""
        if self.plan is None:
            raise RuntimeError("no plan has been made yet")
        return self.plan

    # -- training ------------------------------------------------------------------------------------------------

    def pretrain(self, curves: CurveLogger) -> None:
        """Train the dense net without ADMM."""
        self._train("pretrain", self.dense, self.config.pretrain_epochs, curves)
        self.trained = self.trained or self.config.pretrain_epochs > 0
        if self.trained:
            self.teacher = self.skeleton()
            self.teacher.load_state_dict(self.dense.state_dict())

    def train_dense(self, curves: CurveLogger) -> None:
        """Train the dense net under ADMM; with ``admm=off`` just train it: the control."""
        config = self.config.admm
        if not config.enabled:
            self._train("dense", self.dense, self.config.dense_epochs, curves)
            return
        admm = AdmmCallback(
            self.planned(),
            config.rho,
            pull=config.pull,
            update_every=config.update_every,
            relax=config.relax,
            tolerance=config.tolerance,
            track_truncated=config.track_truncated,
            root="net",
        )
        self._train("admm", self.dense, self.config.dense_epochs, curves, admm=admm)

    def retrain(self, curves: CurveLogger) -> None:
        """Train the factorized net, distilled from the dense one if so set."""
        if self.small is None:
            raise RuntimeError("nothing has been converted yet")
        self._train("retrain", self.small, self.config.retrain_epochs, curves)

    def _train(
        self, stage: str, net: nn.Module, epochs: int, curves: CurveLogger, *, admm: AdmmCallback | None = None
    ) -> None:
        """One training stage, taken from the folder when it is done, skipped when it has no epochs."""
        if self.folder.done(stage):
            self.folder.load_stage(stage, net)
        elif epochs > 0:
            began = time.perf_counter()
            fit_stage(
                stage,
                self._module(stage, net),
                self.data,
                epochs=epochs,
                config=self.config,
                folder=self.folder,
                curves=curves,
                first_step=self.epochs,
                admm=admm,
            )
            facts: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 3)}
            if admm is not None:
                residual = admm.primal[-1] if admm.primal else None
                facts["admm"] = {"status": admm.verdict.value, "primal_residual": residual}
            self.folder.save_stage(stage, net.cpu(), **facts)
        self.epochs += epochs

    def _module(self, stage: str, net: nn.Module) -> LitClassifier:
        config, retraining = self.config, stage == "retrain"
        options: dict[str, Any] = {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}
        if retraining and config.optimizer.retrain_lr is not None:
            options["lr"] = config.optimizer.retrain_lr
        if config.optimizer.name == "sgd":
            options |= {"momentum": config.optimizer.momentum, "nesterov": config.optimizer.nesterov}
        return LitClassifier(
            net,
            optimizer=config.optimizer.name,
            options=options,
            schedule=config.optimizer.schedule,
            warmup_epochs=config.optimizer.warmup_epochs,
            label_smoothing=config.optimizer.label_smoothing,
            teacher=(self.teacher or self.dense) if retraining else None,
            distill_weight=config.distill.weight,
            temperature=config.distill.temperature,
            channels_last=config.trainer.channels_last,
        )

    # -- conversion and results ----------------------------------------------------------------------------------

    def convert(self) -> None:
        """Swap the planned layers and re-estimate BatchNorm, both from the dense net's final weights."""
        stage = "truncated"
        if self.folder.done(stage):
            self.small = convert(self.dense, self.planned(), decompose=False)
            self.folder.load_stage(stage, self.small)
            return
        errors = conversion_errors(self.dense, self.planned())
        self.small = convert(self.dense, self.planned()).to(self.device)
        used = reestimate_batchnorm(self.small, self._training_images(self.config.bn_batches))
        self.small.cpu()
        log.info(
            "converted %d layers, relative error %.3g on average; BatchNorm from %d batches",
            len(errors),
            sum(errors.values()) / len(errors),
            used,
        )
        self.folder.save_stage(stage, self.small, errors=errors)

    def _training_images(self, batches: int) -> Any:
        loader = train_loader(self.data, self.config.data, seed=self.config.seed, device=self.device)
        return (images for images, _ in islice(loader, batches))

    def truncated(self) -> nn.Module:
        """The factorized net as it was right after conversion."""
        net = convert(self.dense, self.planned(), decompose=False)
        self.folder.load_stage("truncated", net)
        return net

    def evaluate(self) -> dict[str, Any]:
        """Cost and test accuracy of every net of the run; the only place that reads the test set."""
        loader = test_loader(self.data, self.config.data, device=self.device)
        nets: dict[str, nn.Module | None] = {"dense": self.dense, "truncated": self.truncated()}
        nets["compressed"] = self.small
        if self.config.pretrain_epochs:
            nets = {"pretrained": self.teacher} | nets
        metrics: dict[str, Any] = {}
        for name, net in nets.items():
            if net is None:
                continue
            cost = count_cost(net.cpu(), self.example)
            metrics[name] = {"test_accuracy": evaluate(net, loader, self.device), **asdict(cost)}
            net.cpu()
        raw = convert(self.dense, self.planned())
        metrics["truncated"]["test_accuracy_raw"] = evaluate(raw, loader, self.device)
        return metrics | self._facts(metrics)

    def _facts(self, metrics: dict[str, Any]) -> dict[str, Any]:
        dense, small, stages = metrics["dense"], metrics["compressed"], self.folder.stages
        return {
            "reduction": {key: 1 - small[key] / dense[key] for key in ("params", "macs")},
            "admm": stages.get("admm", {}).get("admm", {"status": "off", "primal_residual": None}),
            "conversion": stages["truncated"]["errors"],
            "seconds": {name: facts["seconds"] for name, facts in stages.items() if "seconds" in facts},
            "data": {"name": self.config.data.name, "classes": self.data.num_classes},
            "model": {"name": self.config.model.name},
            "weights_sha256": checkpoint.weights_digest(self.small) if self.small else None,
            "seed": self.config.seed,
            "versions": versions(),
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        }


def versions() -> dict[str, Any]:
    """What this run was computed with; other thread counts and versions give other last digits."""
    return {
        "hodec": hodec.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch-lightning": pytorch_lightning.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def finish(config: Config, folder: RunFolder, work: Work, metrics: dict[str, Any]) -> None:
    """Write what outlives the run: the compressed model, the numbers, the report."""
    if work.small is None:
        raise RuntimeError("nothing has been converted yet")
    facts = {
        "model": config.model.name,
        "in_channels": work.data.in_channels,
        "num_classes": work.data.num_classes,
        "image_size": list(work.data.image_size),
    }
    checkpoint.save(work.small, folder.path / "compressed.safetensors", work.planned(), facts=facts)
    write_json(folder.path / "metrics.json", metrics)
    folder.finish("evaluate", metrics=metrics)  # only now: a run that counts as finished has all its files
    if config.report:
        from hodec.report.render import write_report

        log.info("report: %s", write_report(folder.path))
    log.info("%s", summary(metrics))


def summary(metrics: dict[str, Any]) -> str:
    """The result in one line."""
    cut = metrics["reduction"]
    scores = ", ".join(
        f"{name} {metrics[name]['test_accuracy']:.2%}" for name in ("dense", "truncated", "compressed")
    )
    return f"{cut['params']:.1%} fewer parameters, {cut['macs']:.1%} fewer MACs; test accuracy: {scores}"
