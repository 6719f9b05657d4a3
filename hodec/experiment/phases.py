"""The run under way: its nets as they stand after each phase, its plan, its results."""

import logging
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
from torch import nn

from hodec._version import __version__
from hodec.admm.callback import AdmmCallback
from hodec.admm.projection import RankLearner
from hodec.calibration.input_covariance import InputCovariance, collect_covariances
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.swap import conversion_errors, convert
from hodec.cost.count import count_cost
from hodec.errors import ConfigError, PlanError
from hodec.experiment.config.options_of_admm import AdmmOptions
from hodec.experiment.config.rules import build_rule
from hodec.experiment.config.schema import Config
from hodec.experiment.data import ImageData, test_loader, train_loader, val_loader
from hodec.experiment.lit import LitClassifier, evaluate
from hodec.experiment.loggers import CurveLogger
from hodec.experiment.run_folder import RunFolder
from hodec.experiment.training import fit_phase
from hodec.export import checkpoint
from hodec.formats.modes import Modes
from hodec.layers.base import randomize_factors
from hodec.models import build_model, load_weights
from hodec.plan.plan import Plan
from hodec.ranks import Learned, RankRule, make_plan

log = logging.getLogger(__name__)


def device_of(config: Config) -> torch.device:
    """Where the pipeline itself computes: the GPU when training uses one."""
    wanted = config.trainer.accelerator
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class Phases:
    """The run under way: the nets as they stand after the latest phase, and the plan.

    Attributes:
        dense: the dense net; its weights are those of the latest phase that trained it.
        pretrained: the dense net before ADMM, if it was trained by then.
        teacher: the net given to distil from, if there is one.
        small: the factorized net, from ``convert`` on.
        starts: factors that ADMM ended at, of the layers whose format is found by iteration.
    """

    def __init__(self, config: Config, folder: RunFolder, data: ImageData) -> None:
        self.config, self.folder, self.data = config, folder, data
        self.device = device_of(config)
        self.example = torch.zeros(1, data.in_channels, *data.image_size)
        self.dense = self.skeleton()
        if config.init:
            load_weights(self.dense, config.init)
        self.trained = config.init is not None
        self.teacher = self._given_teacher()
        self.pretrained: nn.Module | None = None
        self.plan: Plan | None = None
        self.small: nn.Module | None = None
        self.init_factors: dict[str, list[torch.Tensor]] = {}
        self.epochs = 0

    def skeleton(self, name: str | None = None) -> nn.Module:
        """The dense net, or another one, with fresh weights."""
        data, name = self.data, name or self.config.model.name
        return build_model(
            name, in_channels=data.in_channels, num_classes=data.num_classes, image_size=min(data.image_size)
        )

    def _given_teacher(self) -> nn.Module | None:
        """The net of ``distill.init``, if there is one."""
        settings = self.config.distill
        if settings.init is None:
            return None
        teacher = self.skeleton(settings.model)
        load_weights(teacher, settings.init)
        return teacher

    @property
    def pretrain_epochs(self) -> int:
        """Epochs without ADMM; a rule that reads weights gets as many as ADMM when it would get none at all."""
        config = self.config
        if config.pretrain_epochs or config.init or config.plan or not self.rule().reads_weights:
            return config.pretrain_epochs
        return config.dense_epochs

    # -- plan ----------------------------------------------------------------------------------------------------

    def plan_before_training(self) -> None:
        """Plan now, mistakes show at once; unless the rule reads trained weights and there are none yet."""
        if self.trained or not self.pretrain_epochs or self.config.plan or not self.rule().reads_weights:
            self.make_plan()

    def plan_after_training(self) -> None:
        """Plan from the trained weights, if that was waited for."""
        if self.plan is None:
            self.make_plan()

    def rule(self) -> RankRule:
        """The rank rule that the settings ask for."""
        return build_rule(self.config.ranks, tt_ranks=self.config.tt_ranks, evaluate=self.validation_accuracy)

    def validation_accuracy(self, net: nn.Module) -> float:
        """Accuracy on the validation split: what rules that evaluate nets go by."""
        loader = val_loader(self.data, self.config.data, device=self.device)
        if loader is None:
            rule = self.config.ranks.name
            raise ConfigError(f"ranks={rule} evaluates nets on a validation split, give one: data.val_fraction=0.1")
        return evaluate(net, loader, self.device)

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
            how: dict[str, Any] = config.method.values()
            how["modes"] = {g: Modes(tuple(m["in"]), tuple(m["out"])) for g, m in (how.get("modes") or {}).items()}
            self.plan = make_plan(
                self.dense,
                self.rule(),
                method=config.method.name,
                example_input=self.example,
                include=config.include,
                exclude=config.exclude,
                **how,
            )
        log.info("the plan, before any training:\n%s", self.plan)
        convert(self.dense, self.plan, decompose=False)  # what cannot be swapped shows now, not after hours
        if self.folder.writes:
            self.plan.save(path)
        self.folder.finish("plan")

    def planned(self) -> Plan:
        """The plan, which every phase after planning has."""
        if self.plan is None:
            raise RuntimeError("no plan has been made yet")
        return self.plan

    # -- training ------------------------------------------------------------------------------------------------

    def pretrain(self, curves: CurveLogger) -> None:
        """Train the dense net without ADMM."""
        self._train("pretrain", self.dense, self.pretrain_epochs, curves)
        self.trained = self.trained or self.pretrain_epochs > 0
        if self.trained:
            self.pretrained = self.skeleton()
            self.pretrained.load_state_dict(self.dense.state_dict())

    def train_dense(self, curves: CurveLogger) -> None:
        """Train the dense net under ADMM; with ``admm=off`` just train it: the control."""
        config = self.config.admm
        if not isinstance(config, AdmmOptions):
            self._train("dense", self.dense, self.config.dense_epochs, curves)
            return
        admm = AdmmCallback(
            self.planned(),
            config.rho,
            pull=config.pull,
            update_every=config.update_every,
            relax=config.relax,
            dual=config.dual,
            tolerance=config.tolerance,
            track_truncated=config.track_truncated,
            spread=config.distribute_projection,
            learner=self._learner(),
            covariances=self._metrics() if self.trained else None,  # inputs of a net that knows nothing yet say nothing
            root="net",
        )
        self._train("admm", self.dense, self.config.dense_epochs, curves, admm=admm)
        self._take_over_learned_plan()
        self.init_factors = self.folder.load_factors("admm")

    def _learner(self) -> RankLearner | None:
        """What changes the ranks under ADMM, if the rule does; a plan that is given stays as it is."""
        rule = self.rule()
        return rule.learner() if isinstance(rule, Learned) and not self.config.plan else None

    def _take_over_learned_plan(self) -> None:
        """Go on with the ranks that ADMM has learned, if it did."""
        learned = self.folder.phases.get("admm", {}).get("plan")
        if learned is None:
            return
        self.plan = Plan.from_dict(learned)
        log.info("the plan, with learned ranks:\n%s", self.plan)
        if self.folder.writes:
            self.plan.save(self.folder.path / "plan.json")

    def retrain(self, curves: CurveLogger) -> None:
        """Train the factorized net, distilled from the dense one if so set."""
        if self.small is None:
            raise RuntimeError("nothing has been converted yet")
        self._train("retrain", self.small, self.config.retrain_epochs, curves)

    def _train(
        self, phase: str, net: nn.Module, epochs: int, curves: CurveLogger, *, admm: AdmmCallback | None = None
    ) -> None:
        """One training phase, taken from the folder when it is done, skipped when it has no epochs."""
        if self.folder.done(phase):
            self.folder.load_phase(phase, net)
        elif epochs > 0:
            began = time.perf_counter()
            fit_phase(
                phase,
                self._module(phase, net),
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
                facts |= self._outcome(admm)
            self.folder.save_phase(phase, net.cpu(), **facts)
        self.epochs += epochs

    def _outcome(self, admm: AdmmCallback) -> dict[str, Any]:
        """What later phases and the report need to know of ADMM."""
        residual = admm.primal[-1] if admm.primal else None
        facts: dict[str, Any] = {"admm": {"status": admm.verdict.value, "primal_residual": residual}}
        final = admm.final_plan()
        if admm.learner is not None and isinstance(final, Plan):
            facts["plan"] = final.to_dict()
        self.folder.save_factors("admm", {name: f for name, f in admm.factors.items() if name in final})
        return facts

    def _module(self, phase: str, net: nn.Module) -> LitClassifier:
        config, retraining = self.config, phase == "retrain"
        taught = retraining or (config.distill.dense and phase != "pretrain")
        options: dict[str, Any] = {"lr": config.optimizer.lr, "weight_decay": config.optimizer.weight_decay}
        options |= config.optimizer.torch_arguments()
        if retraining and config.optimizer.retrain_lr is not None:
            options["lr"] = config.optimizer.retrain_lr
        return LitClassifier(
            net,
            optimizer=config.optimizer.name,
            options=options,
            schedule=config.optimizer.schedule,
            warmup_epochs=config.optimizer.warmup_epochs,
            span=self._span(phase),
            label_smoothing=config.optimizer.label_smoothing,
            teacher=(self.teacher or self.pretrained or self.dense) if taught else None,
            distill_weight=config.distill.weight,
            temperature=config.distill.temperature,
            channels_last=config.trainer.channels_last,
            compiled=config.trainer.compile,
        )

    def _span(self, phase: str) -> tuple[float, float]:
        """The part of the learning rate's schedule that a phase covers."""
        config = self.config
        if phase == "pretrain" or not config.optimizer.joint_schedule:
            return 0.0, 1.0
        middle = config.dense_epochs / max(1, config.dense_epochs + config.retrain_epochs)
        return (middle, 1.0) if phase == "retrain" else (0.0, middle)

    # -- conversion and results ----------------------------------------------------------------------------------

    def convert(self) -> None:
        """Swap the planned layers and re-estimate BatchNorm, both from the dense net's final weights."""
        phase = "truncated"
        if self.folder.done(phase):
            self.small = convert(self.dense, self.planned(), decompose=False)
            self.folder.load_phase(phase, self.small)
            return
        self.small = self._converted()
        errors = conversion_errors(self.dense, self.planned(), self.small)
        self.small.to(self.device)
        used = reestimate_batchnorm(self.small, self._training_images(self.config.bn_batches))
        self.small.cpu()
        log.info(
            "converted %d layers, relative error %.3g on average; BatchNorm from %d batches",
            len(errors),
            sum(errors.values()) / len(errors),
            used,
        )
        self.folder.save_phase(phase, self.small, errors=errors)

    def _converted(self) -> nn.Module:
        small = convert(self.dense, self.planned(), covariances=self._metrics(), init_factors=self.init_factors)
        if self.config.random_factors:
            randomize_factors(small, seed=self.config.seed)
        return small

    def _metrics(self) -> dict[str, InputCovariance] | None:
        """Second moments of the planned layers' inputs in the dense net as it is now, where they are wanted."""
        count = self.config.calibration_batches
        if not count:
            return None
        covariances = collect_covariances(self.dense.to(self.device), self.planned(), self._training_images(count))
        self.dense.cpu()
        log.info("data-aware: inputs of %d layers measured in %d batches", len(covariances), count)
        return {name: covariance.to(torch.device("cpu")) for name, covariance in covariances.items()}

    def _training_images(self, batches: int) -> Any:
        loader = train_loader(self.data, self.config.data, seed=self.config.seed, device=self.device)
        return (images for images, _ in islice(loader, batches))

    def truncated(self) -> nn.Module:
        """The factorized net as it was right after conversion."""
        net = convert(self.dense, self.planned(), decompose=False)
        self.folder.load_phase("truncated", net)
        return net

    def evaluate(self) -> dict[str, Any]:
        """Cost and test accuracy of every net of the run; the only place that reads the test set."""
        loader = test_loader(self.data, self.config.data, device=self.device)
        changed = self.pretrain_epochs or self.config.dense_epochs  # else what came trained is the dense net
        nets: dict[str, nn.Module | None] = {
            "teacher": self.teacher,
            "pretrained": self.pretrained if changed else None,
            "dense": self.dense,
            "truncated": self.truncated(),
            "compressed": self.small,
        }
        covariances: dict[str, Any] = {}
        for name, net in nets.items():
            if net is None:
                continue
            cost = count_cost(net.cpu(), self.example)
            covariances[name] = {"test_accuracy": evaluate(net, loader, self.device), **asdict(cost)}
            net.cpu()
        raw = self._converted()
        covariances["truncated"]["test_accuracy_raw"] = evaluate(raw, loader, self.device)
        return covariances | self._facts(covariances)

    def _facts(self, covariances: dict[str, Any]) -> dict[str, Any]:
        dense, small, phases = covariances["dense"], covariances["compressed"], self.folder.phases
        return {
            "reduction": {key: 1 - small[key] / dense[key] for key in ("params", "macs")},
            "admm": phases.get("admm", {}).get("admm", {"status": "off", "primal_residual": None}),
            "conversion": phases["truncated"]["errors"],
            "seconds": {name: facts["seconds"] for name, facts in phases.items() if "seconds" in facts},
            "data": {
                "name": self.config.data.name,
                "classes": self.data.num_classes,
                "images": self.data.split_sizes(),
            },
            "model": {"name": self.config.model.name},
            "weights_sha256": checkpoint.weights_digest(self.small) if self.small else None,
            "seed": self.config.seed,
            "versions": versions(),
            "command": command(),
        }


def command() -> str:
    """The command of this run, as a shell reads it."""
    program = Path(sys.argv[0])
    words = ("hodec", "train") if program == Path(__file__).with_name("__main__.py") else ("python", program.name)
    return shlex.join([*words, *sys.argv[1:]])


def versions() -> dict[str, Any]:
    """What this run was computed with; other thread counts and versions give other last digits."""
    return {
        "hodec": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch-lightning": pytorch_lightning.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }
