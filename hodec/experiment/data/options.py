"""The settings of each data set; without torch, so that a mistake in them shows at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, ClassVar

from hodec.errors import ConfigError, Use
from hodec.experiment.config.targets import NAME_WORDS, WithTargets, bad_function, bad_name
from hodec.options import BadParts, Option, setting


def _bad_mean(values: Sequence[float]) -> BadParts:
    if not values or not all(map(isfinite, values)):
        yield "", values


def _bad_std(values: Sequence[float]) -> BadParts:
    if not values or not all(0 < value < inf for value in values):
        yield "", values


@dataclass(frozen=True, kw_only=True)
class DataOption(Option):
    """What every choice of data has.

    Attributes:
        reader: function that makes an ``ImageData`` of the option, written as an entry point: ``package.module:name``.
        own_mean: of the training images, one number per channel, pixels in 0..1; empty where images come normalised.
        own_std: standard deviations, as ``own_mean``.
    """

    group: ClassVar[str] = "data"
    reader: ClassVar[str]
    own_mean: ClassVar[tuple[float, ...]] = ()
    own_std: ClassVar[tuple[float, ...]] = ()

    @property
    def image_size(self) -> int | None:
        """Side in pixels that images are brought to; None: as they are."""
        return None


@dataclass(frozen=True, kw_only=True)
class Batches(DataOption):
    """How images are split and put into batches."""

    batch_size: int = setting(64, "images per training step and process", low=1)
    eval_batch_size: int = setting(512, "images per evaluation step and process", low=1)
    val_fraction: float = setting(0.1, "share of the training images kept for validation", low=0, below=1)
    train_fraction: float = setting(1.0, "share of the other training images that is used; 1: all", above=0, high=1)
    epoch_batches: int | None = setting(
        None, "steps of an epoch, each epoch other images of the set; null: as many as there are batches", low=1
    )


@dataclass(frozen=True, kw_only=True)
class DataSet(Batches):
    """Settings that all data sets of stored pixels have."""

    augment: bool = setting(False, "random crops and flips of training images")
    crop_padding: int = setting(0, "pixels added on each side before the random crop", low=0)
    flip: bool = setting(False, "mirror half of the training images")
    image_size: int | None = setting(
        None, "side in pixels that images are brought to, 224 for ImageNet nets; null: as they are", low=1
    )
    mean: list[float] | None = setting(
        None,
        "one number per channel or one for all, pixels in 0..1; null: the data set's own",
        words="null or a list of numbers",
        check=_bad_mean,
    )
    std: list[float] | None = setting(
        None,
        "one number per channel or one for all; null: the data set's own",
        words="null or a list of numbers above 0",
        check=_bad_std,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("mean", "std"):
            count, channels = len(getattr(self, key) or [0]), len(self.own_mean)
            if count not in (1, channels):
                text = f"{{setting}}: {count} numbers given for images of {channels} channels; allowed: 1 or {channels}"
                raise ConfigError(text, setting=Use(f"data.{key}"))

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel: the settings where given, else the data set's own."""
        mean, std = self.mean or self.own_mean, self.std or self.own_std
        channels = len(self.own_mean)
        return tuple(mean) * (channels // len(mean)), tuple(std) * (channels // len(std))


def _function(doc: str) -> Any:
    return setting("", doc, words=NAME_WORDS, example="my_package.data.images", check=bad_name)


def _default(key: str, value: object) -> Any:
    """The setting of ``DataSet`` with another default."""
    return field(default=value, metadata=DataSet.__dataclass_fields__[key].metadata)


@dataclass(frozen=True, kw_only=True)
class Digits(DataSet):
    """1,797 grey digits of 8 x 8 that come with scikit-learn: nothing to download, seconds per epoch."""

    name: ClassVar[str] = "digits"
    reader: ClassVar[str] = "hodec.experiment.data.tensor_sets:digits"
    own_mean, own_std = (0.3060,), (0.3763,)  # of the training part


@dataclass(frozen=True, kw_only=True)
class Fake(DataSet):
    """Images made up from a fixed seed: a smoke test without any file."""

    name: ClassVar[str] = "fake"
    reader: ClassVar[str] = "hodec.experiment.data.tensor_sets:fake"
    own_mean, own_std = (0.5, 0.5, 0.5), (0.23, 0.23, 0.23)

    image_size: int = setting(16, "side of the images in pixels", low=1)
    fake_size: int = setting(512, "images to make up", low=2)
    fake_classes: int = setting(10, "classes to make up", low=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fake_size < 2 * self.fake_classes:
            size, classes = Use("data.fake_size", self.fake_size), Use("data.fake_classes", self.fake_classes)
            raise ConfigError(
                "{size} given with {classes}; allowed: 2 or more of each class", size=size, classes=classes
            )


@dataclass(frozen=True, kw_only=True)
class Photographs(DataSet):
    """Settings of photographs, which are augmented unless told otherwise."""

    batch_size: int = _default("batch_size", 128)
    augment: bool = _default("augment", True)
    crop_padding: int = _default("crop_padding", 4)
    flip: bool = _default("flip", True)


@dataclass(frozen=True, kw_only=True)
class Cifar10(Photographs):
    """50,000 + 10,000 colour images of 32 x 32 in 10 classes; the first time with data.download=true."""

    name: ClassVar[str] = "cifar10"
    reader: ClassVar[str] = "hodec.experiment.data.tensor_sets:cifar"
    own_mean, own_std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    root: str = setting("data", "folder of the downloaded files")
    download: bool = setting(False, "fetch the files when they are missing")


@dataclass(frozen=True, kw_only=True)
class Cifar100(Cifar10):
    """50,000 + 10,000 colour images of 32 x 32 in 100 classes; the first time with data.download=true."""

    name: ClassVar[str] = "cifar100"


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Photographs):
    """Your own images, one folder per class: ROOT/train/CLASS/*, ROOT/test/CLASS/* and, if there is one, ROOT/val.

    Or parquet files of Hugging Face's datasets, ROOT/data/train-*.parquet; needs pyarrow: pip install datasets.
    """

    name: ClassVar[str] = "image_folder"
    reader: ClassVar[str] = "hodec.experiment.data.folder:image_folder"
    own_mean, own_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

    eval_batch_size: int = _default("eval_batch_size", 256)
    root: str | None = setting(None, "the folder, always to be given")
    num_workers: int = setting(2, "processes that read images; not used with in_memory", low=0)
    in_memory: bool | None = setting(
        None, "hold all images decoded: faster; null: when they fit into 2 GiB; those on disk read no crop_padding"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.root:
            text = "{root}: missing; image_folder needs the folder of train/CLASS/* and test/CLASS/*: {path}"
            raise ConfigError(text, root=Use("data.root"), path=Use("data.root", "PATH"))


@dataclass(frozen=True, kw_only=True)
class Functions(Batches, WithTargets):
    """Your own images: functions that return a torch Dataset, or a pair of tensors, (N, C, H, W) and labels (N,)."""

    name: ClassVar[str] = "functions"
    reader: ClassVar[str] = "hodec.experiment.data.own:functions"

    train: str = _function("function of no arguments that returns the training images, floats as the net takes them")
    test: str = _function("function that returns the test images")
    val: str | None = setting(
        None,
        "function that returns the validation images; null: val_fraction of the training images",
        words=NAME_WORDS,
        check=bad_name,
    )
    num_workers: int = setting(0, "processes that read images", low=0)

    def problems(self) -> Iterator[str]:
        """What is wrong with the functions."""
        for name in ("train", "test", "val"):
            if target := getattr(self, name):
                yield from (f"{self.group}.{name}: {text}" for text in bad_function(target))


# The choices of data=NAME; a data set of somebody else is one entry more.
DATA_SETS: dict[str, type[DataOption]] = {
    kind.name: kind for kind in (Digits, Cifar10, Cifar100, ImageFolder, Fake, Functions)
}
