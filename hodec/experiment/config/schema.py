"""The settings of a run: one frozen dataclass per group of `conf/`, their checks, and their text form.

`conf/*.yaml` gives the values and explains each key; the classes here give the types and the ranges, and are
the schema that Hydra checks the files and the command line against. Nothing here imports torch, so that a
mistake in the settings shows at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, reduce
from pkgutil import resolve_name
from types import NoneType
from typing import Any, ClassVar, cast, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hodec.errors import ConfigError
from hodec.experiment.config.values import (
    Allowed,
    bad_empty_list,
    bad_globs,
    bad_interval,
    bad_modes,
    bad_ranks,
    bad_rho,
    setting,
)
from hodec.experiment.data.options import DATA_SETS, DataSet
from hodec.options import settings_of

GLOBS = "null or a list of layer globs: [layer1.*,layer2.0.conv1]"


RULE_NAMES = ("manual", "ratio", "energy", "vbmf", "amct", "budget", "greedy", "equal_residual", "learned")


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "resnet20"
    source: str = setting("hodec", choices=("hodec", "torchvision"))


@dataclass(frozen=True)
class DataConfig(DataSet):
    """The settings of all data sets in one; ``build_data`` picks those of the set that ``name`` chooses."""

    reader: ClassVar[str] = "hodec.experiment.config.schema:DataConfig.read"

    name: str = setting("digits", choices=tuple(DATA_SETS))  # type: ignore[misc]
    root: str | None = None
    num_workers: int = setting(0, low=0)
    download: bool = False
    in_memory: bool | None = None
    fake_size: int = setting(512, low=2)
    fake_classes: int = setting(10, low=2)

    def __post_init__(self) -> None:
        """Nothing is refused here: ``validate`` lists all problems."""

    def read(self) -> object:
        """The ``ImageData`` of the chosen set."""
        kind = DATA_SETS[self.name]
        own = {key: value for key in settings_of(kind) if (value := getattr(self, key)) is not None}
        return resolve_name(kind.reader)(kind(**own))


@dataclass(frozen=True)
class MethodConfig:
    """How a layer is factorized."""

    name: str = "tt"
    n_modes: int = setting(2, low=1, high=4)
    modes: Any = setting(None, words="null or {layer glob: {in: [4,4], out: [8,4]}}", check=bad_modes)
    execution: str = setting("auto", choices=("auto", "chain", "merged"))


@dataclass(frozen=True)
class RanksConfig:
    """What chooses the ranks."""

    rule: str = setting("manual", choices=RULE_NAMES)
    default: int = setting(8, low=1)
    target: float = setting(0.5, above=0, high=1)
    metric: str = setting("macs", choices=("macs", "params", "latency_ms"))
    keep: float = setting(0.9, above=0, high=1)
    recommendation_ratio: float = setting(0.0, low=-1, high=1)
    alpha: float | None = setting(None, low=0)
    macs: float | None = setting(None, above=0, below=1)
    params: float | None = setting(None, above=0, below=1)
    latency_ms: float | None = setting(None, above=0)
    methods: list[str] | None = setting(None, words="null or a list of methods: [tt,spatial_svd]", check=bad_empty_list)
    tolerance: float = setting(0.005, above=0, below=1)
    ratios: int = setting(10, low=2)
    monotonic: bool = False
    multiplicity: int = setting(1, low=1)
    ignore: list[str] | None = setting(None, words="null or a list of globs: [conv1,layer1.0.*]", check=bad_globs)
    indices: int = setting(20, low=2, high=50)
    weight: float = setting(1.0, above=0)
    round_to: int = setting(1, low=1)
    min_rank: int = setting(1, low=1)
    max_rank: int | None = setting(None, low=1)


@dataclass(frozen=True)
class AdmmConfig:
    """How the dense weights are drawn towards low rank."""

    enabled: bool = True
    rho: Any = setting(
        "auto",
        words="auto | balanced | a number above 0 | {epoch: number} | {layer glob: number}",
        check=bad_rho,
    )
    pull: float = setting(0.8, above=0, below=1)
    update_every: Any = setting(1, words="whole epochs from 1, or 50steps, 2epochs", check=bad_interval)
    relax: float = setting(1.0, low=1, high=1.9)
    dual: bool = True
    tolerance: float = setting(1e-3, low=0)
    track_truncated: bool = True
    spread: bool = True


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate over time, in every phase of training."""

    name: str = setting("sgd", choices=("sgd", "adamw"))
    lr: float = setting(0.1, above=0)
    momentum: float = setting(0.9, low=0, below=1)
    nesterov: bool = True
    weight_decay: float = setting(5e-4, low=0)
    schedule: str = setting("cosine", choices=("cosine", "linear", "step", "constant"))
    warmup_epochs: int = setting(0, low=0)
    retrain_lr: float | None = setting(0.02, above=0)
    joint_schedule: bool = False
    label_smoothing: float = setting(0.0, low=0, below=1)


@dataclass(frozen=True)
class DistillConfig:
    """Learning from a trained dense network while the factorized one is retrained, and under ADMM."""

    weight: float = setting(0.0, low=0, high=1)
    temperature: float = setting(4.0, above=0)
    dense: bool = False
    model: str | None = None
    init: str | None = None


@dataclass(frozen=True)
class TrainerConfig:
    """The hardware and the arithmetic."""

    accelerator: str = setting("auto", choices=("auto", "cpu", "gpu", "cuda", "mps"))
    devices: int = setting(1, low=1)
    precision: str = setting("32-true", choices=("32-true", "bf16-mixed", "16-mixed"))
    channels_last: bool = False
    compile: bool = False
    gradient_clip_val: float | None = setting(None, above=0)
    accumulate_grad_batches: int = setting(1, low=1)
    deterministic: bool = False
    threads: int | None = setting(None, low=1)


@dataclass(frozen=True)
class LoggerConfig:
    """Where curves go besides the files of the run folder."""

    name: str = setting("csv", choices=("csv", "wandb", "tensorboard"))
    project: str = "hodec"
    mode: str = setting("auto", choices=("auto", "online", "offline", "disabled"))
    init_timeout: int = setting(20, low=1)


@dataclass(frozen=True)
class Config:
    """All settings of one run; the defaults are those of a plain ``python train.py``."""

    seed: int = setting(0, low=0, high=2**32 - 1)
    init: str | None = None
    tt_ranks: Any = setting(
        None,
        words="null, a whole number from 1, a list of them, or {layer glob: number or list},"
        " quoted for the shell: 'tt_ranks={layer1.*:8}'",
        check=bad_ranks,
    )
    plan: str | None = None
    pretrain_epochs: int = setting(0, low=0)
    dense_epochs: int = setting(15, low=0)
    retrain_epochs: int = setting(10, low=0)
    include: list[str] | None = setting(None, words=GLOBS, check=bad_globs)
    exclude: list[str] | None = setting(None, words=GLOBS, check=bad_globs)
    bn_batches: int = setting(100, low=0)
    calibration_batches: int = setting(0, low=0)
    random_factors: bool = False
    report: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    admm: AdmmConfig = field(default_factory=AdmmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


COMBINATIONS: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (
        lambda c: c.tt_ranks is not None and c.ranks.rule != "manual",
        "tt_ranks: given together with another rule than manual; allowed: ranks=manual, or tt_ranks=null",
    ),
    (
        lambda c: c.ranks.methods is not None and c.ranks.rule != "budget",
        "ranks.methods: given with another rule than budget; allowed: ranks=budget, or one method for all: method=tt",
    ),
    (
        lambda c: (
            c.ranks.rule == "learned" and c.ranks.alpha is not None and not c.ranks.macs is c.ranks.params is None
        ),
        "ranks.alpha: with ranks=learned give either it, ranks.alpha=0.1, or targets: ranks.macs=0.4",
    ),
    (
        lambda c: c.ranks.rule == "learned" and not c.plan and not (c.admm.enabled and c.dense_epochs),
        "ranks: learned given without ADMM, which learns them; allowed: dense_epochs from 1 and admm=default, or "
        "ranks=budget",
    ),
    (
        lambda c: (
            bool(c.calibration_batches and c.admm.enabled and c.dense_epochs)
            and not c.plan
            and not {"cp", "cp3"}.isdisjoint(c.ranks.methods or [c.method.name])
        ),
        "calibration_batches: given with cp or cp3 under ADMM, which projects them by iteration; "
        "allowed: calibration_batches=0, admm=off, or another method",
    ),
    (
        lambda c: c.distill.dense and not (c.distill.weight and (c.init or c.pretrain_epochs or c.distill.init)),
        "distill.dense: true given, but nothing teaches the dense net; allowed: distill.weight above 0 together with a "
        "trained net, init=FILE, pretrain_epochs=30 or distill.init=FILE",
    ),
    (
        lambda c: bool(c.distill.init and not c.distill.weight) or bool(c.distill.model and not c.distill.init),
        "distill.init: another net that teaches needs its weights, distill.init=FILE, and a share, distill.weight=0.8",
    ),
    (
        lambda c: c.optimizer.name == "sgd" and c.optimizer.nesterov and c.optimizer.momentum == 0,
        "optimizer.momentum: 0 given; allowed: above 0, or optimizer.nesterov=false",
    ),
    (
        lambda c: c.trainer.precision == "16-mixed" and c.trainer.accelerator == "cpu",
        "trainer.precision: '16-mixed' given; allowed on a cpu: 32-true | bf16-mixed",
    ),
    (
        lambda c: c.data.name == "image_folder" and not c.data.root,
        "data.root: missing; data=image_folder needs the folder of train/CLASS/* and test/CLASS/*: data.root=PATH",
    ),
)

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list[float]: "a list of numbers"}


@dataclass(frozen=True)
class Leaf:
    """One setting of the schema: its type (without null), whether it may be null, and what it may hold."""

    kind: Any
    optional: bool
    allowed: Allowed

    def words(self) -> str:
        """What may be given, in words: ``'a number above 0 and below 1'``."""
        if self.allowed.words:
            return self.allowed.words
        return f"{'null or ' if self.optional else ''}{KINDS[self.kind]}{self.allowed.limits()}"


@cache
def schema_leaves() -> dict[str, Leaf]:
    """Every setting by its dotted key, in the order of the classes."""

    def walk(schema: type, prefix: str) -> Iterator[tuple[str, Leaf]]:
        hints = get_type_hints(schema)
        for one in fields(schema):  # type: ignore[arg-type]
            hint = hints[one.name]
            if is_dataclass(hint):
                yield from walk(cast(type, hint), f"{prefix}{one.name}.")
            else:
                optional = NoneType in get_args(hint)
                kind = next(part for part in get_args(hint) if part is not NoneType) if optional else hint
                yield prefix + one.name, Leaf(kind, optional, one.metadata.get("allowed", Allowed()))

    return dict(walk(Config, ""))


def problem(key: str, given: Any, where: str = "") -> str:
    """The sentence for a value that `key` may not hold; `where` names the wrong entry of a mapping."""
    return f"{key}{where}: {given!r} given; allowed: {schema_leaves()[key].words()}"


def validate(config: Config) -> list[str]:
    """List everything in `config` that is out of range or does not go together; empty when all is well."""
    problems = []
    for key, leaf in schema_leaves().items():
        value = reduce(getattr, key.split("."), config)
        problems += [problem(key, part, where) for where, part in leaf.allowed.bad_parts(value)]
    return problems + [text for wrong, text in COMBINATIONS if wrong(config)]


def refuse(problems: Sequence[str]) -> None:
    """Raise one ConfigError that lists `problems`, each once; do nothing when there are none."""
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        raise ConfigError(unique[0])
    if unique:
        raise ConfigError("\n  ".join([f"{len(unique)} problems in the settings:", *unique]))


def to_config(cfg: DictConfig) -> Config:
    """Turn what Hydra composed into a Config; a torchvision model gets its full name, torchvision/resnet18.

    Raises:
        ConfigError: an interpolation cannot be resolved, or the settings were composed without the schema.
    """
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: " * bool(key) + str(error).splitlines()[0]) from None
    if not isinstance(config, Config):
        raise ConfigError("the settings have no schema; allowed: a file whose defaults list starts with '- schema'")
    model = config.model
    if model.source == "torchvision" and "/" not in model.name:
        return replace(config, model=replace(model, name=f"torchvision/{model.name}"))
    return config


def to_yaml(config: Config) -> str:
    """The settings as YAML text, in the order of the classes."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def differences(a: dict[str, Any], b: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values differ between two plain settings; a key in `ignore` hides all below it."""
    flat_a, flat_b = dict(_flatten(a)), dict(_flatten(b))
    absent = object()
    return [
        key
        for key in dict.fromkeys([*flat_a, *flat_b])
        if flat_a.get(key, absent) != flat_b.get(key, absent)
        and not any(key == hidden or key.startswith(f"{hidden}.") for hidden in ignore)
    ]


def _flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a tree of dicts; keys become text and tuples lists, as JSON would have them."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def open_schema() -> DictConfig:
    """An empty set of settings that knows its types and can be written to.

    OmegaConf makes what comes from a frozen dataclass read-only, but Hydra has to merge files into it.
    """

    def thaw(node: DictConfig) -> None:
        OmegaConf.set_readonly(node, None)
        for key in node:
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                thaw(child)

    schema = OmegaConf.structured(Config)
    thaw(schema)
    return schema


def job_folder(number: int, overrides: str) -> str:
    """Folder name of one job of a sweep, in characters that need no quotes: ``0_admm.rho-1e-4``."""
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", overrides).strip("-.")[:120]
    return f"{number}_{plain}" if plain else str(number)


# At import, not in a function: the workers of a parallel launcher import this module and call nothing.
ConfigStore.instance().store("schema", open_schema())
OmegaConf.register_new_resolver("hodec.job_folder", job_folder, replace=True)
