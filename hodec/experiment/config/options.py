"""The settings of the experiment's own options: network, method, optimizer, distillation, machine, logger."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any, ClassVar, cast

from hodec.errors import ConfigError, Use
from hodec.experiment.config.objectives import OBJECTIVES, bad_objectives
from hodec.experiment.config.targets import WithTargets, bad_node, bad_nodes, problems
from hodec.options import BadParts, Option, Settings, setting
from hodec.ranks.manual import bad_ranks

TORCHVISION = "torchvision/"
SOURCES = ("torchvision", "timm")  # of nets whose names have the prefix SOURCE/
CIFAR_RESNETS = tuple(f"resnet{depth}" for depth in (20, 32, 44, 56, 110))


def _bad_globs(value: Sequence[str]) -> BadParts:
    """A list with an empty name in it."""
    if not all(value):
        yield "", value


def _bad_keys(value: object) -> BadParts:
    """The entries of a mapping whose keys are no globs: a number has to stand in quotes."""
    for glob, one in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(glob, str) or not glob:
            yield "", {glob: one}


def _bad_ranks(value: object) -> BadParts:
    """What is wrong in ranks: a count, a list of counts, or {layer glob: either of both}."""
    yield from _bad_keys(value)
    yield from bad_ranks(value)


def _bad_modes(value: object) -> BadParts:
    """What is wrong in {layer glob: {in: counts, out: counts}}."""
    yield from _bad_keys(value)
    if not isinstance(value, Mapping) or not value:
        yield "", value
        return
    for glob, sides in value.items():
        if not isinstance(sides, Mapping) or set(sides) != {"in", "out"} or not all(map(_are_counts, sides.values())):
            yield f"[{glob}]", sides


def _are_counts(value: object) -> bool:
    """Whether ``value`` is a filled list of whole numbers from 1; true and false are not numbers."""
    return isinstance(value, list | tuple) and bool(value) and all(type(n) is int and n >= 1 for n in value)


GLOBS: dict[str, Any] = {"words": "a list of layer globs", "example": "[layer1.*,layer2.0.conv1]", "check": _bad_globs}


@dataclass(frozen=True)
class RunSettings(Settings):
    """The settings of a run that belong to no group."""

    seed: int = setting(0, "of weights, order of the data and every other random draw", low=0, high=2**32 - 1)
    init: str | None = setting(None, "file with trained dense weights to start from; null: random weights")
    init_stage: str | None = setting(
        None, "RUN/admm: begin with what another run has finished, its folder and phase, to vary what follows; null: no"
    )
    tt_ranks: object | None = setting(
        None,
        "16: at most 16 everywhere; [8, 12, 8, 8]: at most these, for layers of four ranks; "
        "{layer1.*: 9, layer2.*: [4, 8, 8, 4]}: by layer glob; null: the number of ranks.default",
        words="a whole number from 1, a list of them, or {layer glob: number or list}",
        example="{layer1.*:8}",
        check=_bad_ranks,
    )
    plan: str | None = setting(None, "a plan.json to obey, made and edited before; null: the rank rule decides")
    pretrain_epochs: int = setting(0, "training of the dense net before the plan is made, without ADMM; epochs", low=0)
    dense_epochs: int = setting(15, "training of the dense net under ADMM; epochs, 0: no ADMM either", low=0)
    retrain_epochs: int = setting(10, "training of the factorized net; epochs", low=0)
    include: list[str] | None = setting(None, "layers that may be factorized; null: all that can be", **GLOBS)
    exclude: list[str] | None = setting(None, "layers that stay dense; null: none", **GLOBS)
    bn_batches: int = setting(
        100, "training batches that re-estimate BatchNorm after conversion; 0: keep its statistics", low=0
    )
    calibration_batches: int = setting(
        0, "training batches whose layer inputs weigh the projection (data-aware); 0: weights alone", low=0
    )
    fade_epochs: int = setting(
        0,
        "first epochs of retraining in which what conversion cuts off fades out of the net; 0: it is cut at once",
        low=0,
    )
    random_factors: bool = setting(
        False, "true: the factors start from random numbers instead of the dense weights: the control"
    )
    report: bool = setting(True, "write report.html and report.md into the run folder")
    objective: object = setting(
        "validation_accuracy",
        "of the compressed net, what a sweeper optimises; the test set is none of it",
        words=" | ".join(OBJECTIVES) + " | a list of some",
        example="[validation_accuracy,macs]",
        check=bad_objectives,
    )
    macs_limit: float | None = setting(
        None,
        "for a sweeper, the accuracy of a net that keeps more than this share of the MACs is minus the excess",
        above=0,
        high=1,
    )


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which network is trained; one of torchvision has the name ``torchvision/resnet18``, of timm ``timm/resnet18``."""

    group: ClassVar[str] = "model"

    name: str = setting("resnet20", "the network")
    source: str = setting("hodec", "where the name is looked up", choices=("hodec", *SOURCES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source in SOURCES:
            prefix = f"{self.source}/"
            object.__setattr__(self, "name", prefix + self.name.removeprefix(prefix))


# Entries of ``optimizer.scheduler`` that Lightning reads: when it steps (epoch, the default, or step), by which curve.
SCHEDULER_WORDS = ("interval", "monitor")


def _bad_scheduler(value: object) -> BadParts:
    """What is no mapping with a ``_target_``, or steps at another time than Lightning does."""
    yield from bad_node(value)
    if isinstance(value, Mapping) and value.get("interval", "epoch") not in ("epoch", "step"):
        yield "[interval]", value["interval"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Option, WithTargets):
    """The learning rate over time, in every phase of training."""

    group: ClassVar[str] = "optimizer"

    schedule: str = setting("cosine", "over each phase of training", choices=("cosine", "linear", "step", "constant"))
    warmup_epochs: int = setting(0, "epochs in which the rate rises from 0", low=0)
    joint_schedule: bool = setting(
        False, "true: one schedule over ADMM and retraining together, its later part as high as retrain_lr says"
    )
    label_smoothing: float = setting(0.0, "share of the label spread over all classes", low=0, below=1)
    scheduler: object | None = setting(
        None,
        "torch's or one's own, of one argument more, the optimizer, in the place of schedule; with interval: step it "
        "steps after each batch; null: schedule",
        words="a mapping with the dotted name of a scheduler and its arguments",
        example="{_target_:torch.optim.lr_scheduler.StepLR,step_size:5}",
        check=_bad_scheduler,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler is not None and (self.warmup_epochs or self.joint_schedule):
            raise ConfigError(
                "{scheduler}: given together with a warm-up or a schedule over both phases, which are of the other "
                "schedules; allowed: {warmup} and {joint}",
                scheduler=Use("optimizer.scheduler"),
                warmup=Use("optimizer.warmup_epochs", 0),
                joint=Use("optimizer.joint_schedule", "false"),
            )

    def problems(self) -> Iterator[str]:
        """What is wrong with the scheduler."""
        if isinstance(self.scheduler, Mapping):
            node = {key: value for key, value in self.scheduler.items() if key not in SCHEDULER_WORDS}
            yield from problems(f"{self.group}.scheduler", node, places=1)

    def torch_arguments(self) -> dict[str, object]:
        """What torch's optimizer is given besides the rate and the decay."""
        return {}


def _bad_rate(value: object) -> BadParts:
    """A rate that is neither ``auto`` nor a number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf
    if value != "auto" and not number:
        yield "", value


RETRAIN_LR: dict[str, Any] = {
    "doc": "highest rate when the factorized net is retrained; auto: lr or a half, a quarter, .. of it, where a short "
    "descent ends lowest; null: the same as lr",
    "words": "auto or a number above 0",
    "check": _bad_rate,
}


@dataclass(frozen=True)
class SgdSettings(OptimizerSettings):
    """Stochastic gradient descent with momentum."""

    name: ClassVar[str] = "sgd"

    lr: float = setting(0.1, "learning rate at its highest", above=0)
    retrain_lr: float | str | None = setting(0.02, **RETRAIN_LR)
    weight_decay: float = setting(5e-4, "added to the gradient, times the weight", low=0)
    momentum: float = setting(0.9, "decay of the mean gradient", low=0, below=1)
    nesterov: bool = setting(True, "look ahead along the momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "{momentum}: 0 given; allowed: above 0, or {plain}",
                momentum=Use("optimizer.momentum"),
                plain=Use("optimizer.nesterov", "false"),
            )

    def torch_arguments(self) -> dict[str, object]:
        return {"momentum": self.momentum, "nesterov": self.nesterov}


@dataclass(frozen=True)
class MuonSettings(SgdSettings):
    """SGD for all but the factors, which move by orthogonalized momentum when the factorized net is retrained."""

    name: ClassVar[str] = "muon"

    factor_lr: float = setting(0.008, "highest step of a factor, as a share of its norm", above=0, below=1)

    def torch_arguments(self) -> dict[str, object]:
        return {**super().torch_arguments(), "factor_lr": self.factor_lr}


@dataclass(frozen=True)
class ScaledGdSettings(SgdSettings):
    """SGD whose gradients of factors are divided by the Gram matrices of the other factors."""

    name: ClassVar[str] = "scaled_gd"

    retrain_lr: float | str | None = setting(0.05, **RETRAIN_LR)


@dataclass(frozen=True)
class AdamWSettings(OptimizerSettings):
    """Adam with decoupled weight decay."""

    name: ClassVar[str] = "adamw"

    lr: float = setting(1e-3, "learning rate at its highest", above=0)
    retrain_lr: float | str | None = setting(5e-4, **RETRAIN_LR)
    weight_decay: float = setting(0.05, "decoupled from the gradient", low=0)
    beta1: float = setting(0.9, "decay of the mean gradient", low=0, below=1)
    beta2: float = setting(0.999, "decay of the mean squared gradient", low=0, below=1)

    def torch_arguments(self) -> dict[str, object]:
        return {"betas": (self.beta1, self.beta2)}


@dataclass(frozen=True)
class DistillSettings(Settings):
    """A trained dense net teaches the factorized one while it is retrained."""

    group: ClassVar[str] = "distill"

    weight: float = setting(0.0, "share of the teacher in the loss; 0: off", low=0, high=1)
    temperature: float = setting(4.0, "softens both outputs", above=0)
    features: float = setting(
        0.0, "weight of the distances of the factorized layers' outputs from those of the dense layers; 0: off", low=0
    )
    dense: bool = setting(False, "true: it teaches the dense net during dense_epochs too")
    model: str | None = setting(
        None, "another net that teaches, resnet56 or torchvision/resnet50; null: one like the net that is trained"
    )
    init: str | None = setting(None, "its trained weights; null: the dense net itself teaches, as it was before ADMM")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init and not self.weight) or (self.model and not self.init):
            raise ConfigError(
                "{init}: another net that teaches needs its weights, {file}, and a share, {share}",
                init=Use("distill.init"),
                file=Use("distill.init", "FILE"),
                share=Use("distill.weight", 0.8),
            )


@dataclass(frozen=True)
class TrainerSettings(WithTargets):
    """The hardware and the arithmetic."""

    group: ClassVar[str] = "trainer"

    accelerator: str = setting(
        "auto", "what computes; auto: what there is", choices=("auto", "cpu", "gpu", "cuda", "mps")
    )
    devices: int = setting(1, "how many on each machine; one in a sweep", low=1)
    num_nodes: int = setting(1, "machines; each starts the same command, see docs/scale.md; one in a sweep", low=1)
    strategy: str = setting("auto", "how several devices train; auto: ddp", choices=("auto", "ddp"))
    precision: str = setting("32-true", "ADMM itself is always 32", choices=("32-true", "bf16-mixed", "16-mixed"))
    channels_last: bool = setting(False, "memory order of images, faster with reduced precision")
    compile: bool = setting(False, "train through torch.compile: first step slow, then faster where kernels are many")
    gradient_clip_val: float | None = setting(None, "largest norm of the gradient; null: no limit", above=0)
    accumulate_grad_batches: int = setting(1, "batches per optimizer step", low=1)
    deterministic: bool = setting(False, "only operations that give the same bits each time; slower")
    checkpoint_minutes: float | None = setting(
        10.0, "between two checkpoints within an epoch, exact as those at its end; null: only there", above=0
    )
    threads: int | None = setting(None, "CPU threads; null: as torch chooses", low=1)
    callbacks: object | None = setting(
        None,
        "Lightning's callbacks of one's own, made anew in each phase",
        words="null or a list of mappings, each with the dotted name of a callback and its arguments",
        example="[{_target_:my_package.MyCallback}]",
        check=bad_nodes,
    )

    def problems(self) -> Iterator[str]:
        """What is wrong with the callbacks."""
        for index, node in enumerate(cast(Sequence[Mapping[str, object]], self.callbacks or ())):
            yield from problems(f"{self.group}.callbacks[{index}]", node)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            raise ConfigError(
                "{precision}: '16-mixed' given; allowed on a cpu: 32-true | bf16-mixed",
                precision=Use("trainer.precision"),
            )


@dataclass(frozen=True)
class MethodSettings(Option):
    """A method that leaves channels whole."""

    group: ClassVar[str] = "method"

    execution: str = setting("auto", "how inference runs it; auto: the cheaper", choices=("auto", "chain", "merged"))


@dataclass(frozen=True)
class ModesMethodSettings(Option):
    """A method that splits channel counts into modes."""

    group: ClassVar[str] = "method"

    n_modes: int = setting(2, "modes a channel count splits into, 64 -> 8 x 8 for 2; 1 is Tucker-2", low=1, high=4)
    modes: object | None = setting(
        None,
        "the split by layer; null: as even as it goes",
        words="{layer glob: {in: counts, out: counts}}",
        example="{layer1.*:{in:[4,4],out:[8,4]}}",
        check=_bad_modes,
    )
    execution: str = setting(
        "auto",
        "chain: one contraction per core; merged: three convolutions; auto: the cheaper",
        choices=("auto", "chain", "merged"),
    )


@cache
def method_settings(name: str, *, uses_modes: bool) -> type[MethodSettings] | type[ModesMethodSettings]:
    """The settings of the method ``name``; the same class each time."""
    kind = type(name, (ModesMethodSettings if uses_modes else MethodSettings,), {"name": name})
    return dataclass(frozen=True)(kind)
