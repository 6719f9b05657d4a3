"""The phases of a run: each takes values and returns a new one, which the run folder keeps."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hodec.admm.lightning import AdmmCallback
from hodec.admm.options import AdmmOff, AdmmProject
from hodec.calibration.input_covariance import InputCovariance, collect_covariances
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.swap import conversion_errors, convert
from hodec.errors import ConfigError, PlanError
from hodec.experiment.config.options import ModelSettings
from hodec.experiment.config.own import CustomModel
from hodec.experiment.config.schema import Config
from hodec.experiment.context import RunContext, device_of
from hodec.experiment.data.images import ImageData
from hodec.experiment.data.loaders import val_loader
from hodec.experiment.fading import FadeResidual
from hodec.experiment.lit import LitClassifier, evaluate
from hodec.experiment.own_code import optimizer_maker, own_net, scheduler_maker
from hodec.experiment.retraining import Rate, probed_rate
from hodec.experiment.run_folder import Outcome
from hodec.experiment.switching import SwitchWhenStable
from hodec.experiment.training import PhaseCallback, fit_phase
from hodec.formats.modes import Modes
from hodec.io.atomic import JsonObject
from hodec.layers.base import randomize_factors
from hodec.layers.plain import copied
from hodec.models import build_model, load_weights
from hodec.plan.plan import Plan
from hodec.ranks import Learned, RankRule
from hodec.ranks import make_plan as plan_by_rule

log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """The result of training the dense net.

    Attributes:
        net: the dense net.
        plan: the plan to convert it by; where ADMM learns the ranks, they are the last ones.
        factors: layer -> the factors that ADMM ended at, of the layers whose format is found by iteration.
    """

    net: nn.Module
    plan: Plan
    factors: Mapping[str, Sequence[Tensor]]


# -- before any training ---------------------------------------------------------------------------------------------


def rank_rule(config: Config, data: ImageData) -> RankRule | None:
    """Return the rank rule that the settings ask for; None where they give a plan.

    Raises:
        HodecError: a setting of the rule is out of range.
    """

    def validation_accuracy(net: nn.Module) -> float:
        device = device_of(config)
        loader = val_loader(data, device=device)
        if loader is None:
            rule = config.ranks.name
            raise ConfigError(f"ranks={rule} evaluates nets on a validation split, give one: data.val_fraction=0.1")
        return evaluate(net, loader, device)

    if config.plan:
        return None
    arguments = {"tt_ranks": config.tt_ranks, "evaluate": validation_accuracy}
    return replace(config.ranks, **{key: value for key, value in arguments.items() if hasattr(config.ranks, key)})


def dense_net(run: RunContext) -> nn.Module:
    """Return the dense net before any training: with the weights of ``init``, or random ones."""
    return _net(run, run.config.model, run.config.init)


def teacher_net(run: RunContext) -> nn.Module | None:
    """Return the net of ``distill.init``, if there is one."""
    settings = run.config.distill
    teacher = ModelSettings(name=settings.model) if settings.model else run.config.model
    return _net(run, teacher, settings.init) if settings.init else None


def _net(run: RunContext, model: ModelSettings | CustomModel, weights: str | None) -> nn.Module:
    data = run.data
    sizes = {"in_channels": data.in_channels, "num_classes": data.num_classes, "image_size": min(data.image_size)}
    net = own_net(model, data) if isinstance(model, CustomModel) else build_model(model.name, **sizes)
    if weights:
        load_weights(net, weights)
    return net


def make_plan(run: RunContext, dense: nn.Module) -> Plan:
    """Return the plan: the one that the settings give, else that of the rank rule for ``dense``.

    Raises:
        PlanError: the plan is of another net, or has no layers.
    """

    def compute() -> Plan:
        config = run.config
        if run.rule is None:
            plan = Plan.load(str(config.plan))
            if not plan:
                raise PlanError(f"plan={config.plan} has no layers to factorize; with plan=null one is made")
        else:
            how = config.method.values()
            if how.get("modes"):
                how["modes"] = {g: Modes(tuple(m["in"]), tuple(m["out"])) for g, m in how["modes"].items()}
            plan = plan_by_rule(
                dense,
                run.rule,
                method=config.method.name,
                example_input=run.example,
                include=config.include,
                exclude=config.exclude,
                **how,
            )
        log.info("the plan, before any training:\n%s", plan)
        convert(dense, plan, decompose=False)  # a layer that cannot be swapped shows now, not after hours
        return plan

    return run.folder.memo_plan(compute)


# -- training --------------------------------------------------------------------------------------------------------


def pretrain(run: RunContext, dense: nn.Module) -> nn.Module:
    """Return the dense net, trained without ADMM."""
    return _trained(run, "pretrain", dense).net


def train(run: RunContext, dense: nn.Module, plan: Plan, *, teacher: nn.Module) -> Trained:
    """Return the dense net, trained under ADMM; with ``admm=off`` it is just trained: the control."""
    taught_by = teacher if run.config.distill.dense else None
    if isinstance(run.config.admm, AdmmOff):
        return Trained(_trained(run, "dense", dense, teacher=taught_by, make_callback=_switch(run, plan)).net, plan, {})
    outcome = _trained(run, "admm", dense, teacher=taught_by, make_callback=lambda: _admm(run, dense, plan))
    if learned := outcome.facts.get("plan"):
        plan = Plan.from_dict(learned)
        log.info("the plan, with learned ranks:\n%s", plan)
        run.folder.keep_plan(plan)
    return Trained(outcome.net, plan, outcome.factors)


def retrain(run: RunContext, compressed: nn.Module, *, dense: nn.Module, teacher: nn.Module) -> nn.Module:
    """Return the factorized net, trained; ``teacher`` is distilled from, and ``dense`` fades out, where that is set."""
    epochs = run.config.fade_epochs
    fade = (lambda: FadeResidual(dense, epochs)) if epochs else None
    return _trained(run, "retrain", compressed, teacher=teacher, make_callback=fade).net


def _trained(
    run: RunContext,
    phase: str,
    net: nn.Module,
    *,
    teacher: nn.Module | None = None,
    make_callback: Callable[[], PhaseCallback] | None = None,
) -> Outcome:
    """Return a trained copy of ``net``, or ``net`` itself where the phase has no epochs."""

    def compute() -> Outcome:
        callback = make_callback() if make_callback else None
        began = time.perf_counter()
        rate = _rate(run, phase, net, teacher=teacher)
        module = _module(run, phase, copied(net), teacher=teacher, lr=rate.lr)
        earlier = fit_phase(run, phase, module, callback=callback)
        facts: JsonObject = {"seconds": round(earlier + time.perf_counter() - began, 3)}
        if phase == "retrain":
            facts["rate"] = rate._asdict()
        if isinstance(callback, SwitchWhenStable):
            facts["switch"] = callback.facts()
        if not isinstance(callback, AdmmCallback):
            return Outcome(module.net.cpu(), facts)
        core = callback.admm
        final, residual = core.final_plan(), core.primal[-1] if core.primal else None
        facts["admm"] = {"status": core.status.value, "primal_residual": residual}
        if core.projection.learner is not None:
            facts["plan"] = final.to_dict()
        factors = {name: [f.cpu() for f in each] for name, each in core.projection.factors.items() if name in final}
        return Outcome(module.net.cpu(), facts, factors)

    if not run.epochs(phase):
        return Outcome(net)
    return run.folder.memo(phase, lambda: copied(net), compute)


def _switch(run: RunContext, plan: Plan) -> Callable[[], SwitchWhenStable] | None:
    below = getattr(run.config.admm, "switch_below", None)
    if below is None:
        return None
    return lambda: SwitchWhenStable(plan, below=below, warmup_epochs=run.config.optimizer.warmup_epochs)


def _admm(run: RunContext, dense: nn.Module, plan: Plan) -> AdmmCallback:
    learner = run.rule if isinstance(run.rule, Learned) else None
    # The inputs of layers of a net that is not trained yet say nothing.
    covariances = _covariances(run, dense, plan) if run.trained_before else None
    return AdmmCallback(
        plan,
        mode="project" if isinstance(run.config.admm, AdmmProject) else "admm",
        **run.config.admm.values(),
        learner=learner,
        covariances=covariances,
        root="net",
        bn_batches=0,  # a run that was killed ends as one that was not, to the last bit of its checkpoints
    )


def _rate(run: RunContext, phase: str, net: nn.Module, *, teacher: nn.Module | None) -> Rate:
    """Return the highest learning rate of a phase; that of retraining is probed where it is to be found."""
    optimizer = run.config.optimizer
    given = optimizer.retrain_lr if phase == "retrain" else None
    if given != "auto":
        return Rate(optimizer.lr if given is None else float(given))
    return probed_rate(
        run, lambda rate: _module(run, phase, copied(net), teacher=teacher, lr=rate), highest=optimizer.lr
    )


def _module(run: RunContext, phase: str, net: nn.Module, *, teacher: nn.Module | None, lr: float) -> LitClassifier:
    config, optimizer = run.config, run.config.optimizer
    rates = {"lr": lr, "weight_decay": optimizer.weight_decay}
    options = {key: value for key, value in rates.items() if value is not None} | optimizer.torch_arguments()
    return LitClassifier(
        net,
        optimizer=optimizer_maker(optimizer) or optimizer.name,
        options=options,
        schedule=scheduler_maker(optimizer) or optimizer.schedule,
        warmup_epochs=optimizer.warmup_epochs,
        span=_span(run, phase),
        label_smoothing=optimizer.label_smoothing,
        teacher=teacher,
        distill_weight=config.distill.weight,
        temperature=config.distill.temperature,
        feature_weight=config.distill.features,
        channels_last=config.trainer.channels_last,
        compiled=config.trainer.compile,
    )


def _span(run: RunContext, phase: str) -> tuple[float, float]:
    """Return the part of the learning rate's schedule that a phase covers, within (0, 1)."""
    config = run.config
    if phase == "pretrain" or not config.optimizer.joint_schedule:
        return 0.0, 1.0
    middle = config.dense_epochs / max(1, config.dense_epochs + config.retrain_epochs)
    if phase != "retrain":
        return 0.0, middle
    if left := run.folder.handed_over:  # the dense training came no further than this
        middle *= 1 - left / (config.dense_epochs - config.optimizer.warmup_epochs)
    return middle, 1.0


# -- conversion ------------------------------------------------------------------------------------------------------


def compress(run: RunContext, trained: Trained) -> nn.Module:
    """Return the factorized net: the planned layers are swapped and BatchNorm is re-estimated."""
    dense, plan = trained.net, trained.plan

    def compute() -> Outcome:
        covariances = _covariances(run, dense, plan)
        net = convert(dense, plan, covariances=covariances, init_factors=trained.factors)
        if run.config.random_factors:
            randomize_factors(net, seed=run.config.seed)
        errors = conversion_errors(dense, plan, net)
        batches = reestimate_batchnorm(net.to(run.device), run.training_images(run.config.bn_batches))
        words = "converted %d layers, relative error %.3g on average; BatchNorm from %d batches"
        log.info(words, len(errors), sum(errors.values()) / len(errors), batches)
        return Outcome(net.cpu(), {"errors": errors})

    return run.folder.memo("truncated", lambda: convert(dense, plan, decompose=False), compute).net


def _covariances(run: RunContext, dense: nn.Module, plan: Plan) -> dict[str, InputCovariance] | None:
    """Return the covariances of the planned layers' inputs in ``dense``, on the CPU, where they are asked for."""
    count = run.config.calibration_batches
    if not count:
        return None
    covariances = collect_covariances(dense.to(run.device), plan, run.training_images(count))
    dense.cpu()
    log.info("data-aware: inputs of %d layers measured in %d batches", len(covariances), count)
    return {name: covariance.to(torch.device("cpu")) for name, covariance in covariances.items()}
