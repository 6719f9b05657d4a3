"""The settings of each data set: to be replaced by hodec.experiment.data.options, with the same names and fields."""

from dataclasses import dataclass
from typing import ClassVar

from hodec.errors import ConfigError, Use
from hodec.experiment.config.values import bad_scale
from hodec.options import Option, setting


@dataclass(frozen=True, kw_only=True)
class DataSet(Option):
    """How images are read, of every data set."""

    group: ClassVar[str] = "data"

    batch_size: int = setting(64, "images per training step and process", low=1)
    eval_batch_size: int = setting(512, "images per evaluation step and process", low=1)
    val_fraction: float = setting(0.1, "share of the training images kept for validation", low=0, below=1)
    train_fraction: float = setting(1.0, "share of the other training images that is used; 1: all", above=0, high=1)
    augment: bool = setting(False, "random crops and flips of training images")
    crop_padding: int = setting(0, "pixels added on each side before the random crop", low=0)
    flip: bool = setting(False, "mirror half of the training images")
    image_size: int | None = setting(
        None, "side in pixels that images are brought to, 224 for ImageNet nets; null: as they are", low=1
    )
    mean: list[float] | None = setting(
        None, "one number per channel or one for all, pixels in 0..1; null: the data set's own"
    )
    std: list[float] | None = setting(
        None,
        "one number per channel or one for all; null: the data set's own",
        words="a list of numbers above 0",
        check=bad_scale,
    )


@dataclass(frozen=True, kw_only=True)
class Digits(DataSet):
    """1797 grey digits of 8 x 8 that come with scikit-learn: nothing to download, seconds per epoch."""

    name: ClassVar[str] = "digits"


@dataclass(frozen=True, kw_only=True)
class Cifar10(DataSet):
    """50,000 + 10,000 colour images of 32 x 32 in 10 classes; the first time with data.download=true."""

    name: ClassVar[str] = "cifar10"

    root: str | None = setting("data", "folder of the downloaded files")
    download: bool = setting(False, "fetch the files when they are missing")
    batch_size: int = setting(128, "images per training step and process", low=1)
    augment: bool = setting(True, "random crops and flips of training images")
    crop_padding: int = setting(4, "pixels added on each side before the random crop", low=0)
    flip: bool = setting(True, "mirror half of the training images")


@dataclass(frozen=True, kw_only=True)
class Cifar100(Cifar10):
    """50,000 + 10,000 colour images of 32 x 32 in 100 classes; the first time with data.download=true."""

    name: ClassVar[str] = "cifar100"


@dataclass(frozen=True, kw_only=True)
class ImageFolder(DataSet):
    """Your own images, one folder per class: ROOT/train/CLASS/*, ROOT/test/CLASS/* and, if there is one, ROOT/val."""

    name: ClassVar[str] = "image_folder"

    root: str | None = setting(None, "the folder, always to be given")
    num_workers: int = setting(2, "processes that read images; not used with in_memory", low=0)
    in_memory: bool | None = setting(None, "hold all images decoded: faster; null: when they fit into 2 GiB")
    batch_size: int = setting(128, "images per training step and process", low=1)
    eval_batch_size: int = setting(256, "images per evaluation step and process", low=1)
    augment: bool = setting(True, "random crops and flips of training images")
    crop_padding: int = setting(4, "pixels added on each side before the random crop", low=0)
    flip: bool = setting(True, "mirror half of the training images")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.root:
            raise ConfigError(
                "{root}: missing; image_folder needs the folder of train/CLASS/* and test/CLASS/*: {path}",
                root=Use("data.root"),
                path=Use("data.root", "PATH"),
            )


@dataclass(frozen=True, kw_only=True)
class Fake(DataSet):
    """Images made from the seed: a smoke test without any file."""

    name: ClassVar[str] = "fake"

    fake_size: int = setting(512, "images to make up", low=2)
    fake_classes: int = setting(10, "classes to make up", low=2)
    image_size: int | None = setting(16, "side of the images in pixels", low=1)


DATA_SETS: dict[str, type[DataSet]] = {
    kind.name: kind
    for kind in (
        Digits,
        Cifar10,
        Cifar100,
        ImageFolder,
        Fake,
    )
}
