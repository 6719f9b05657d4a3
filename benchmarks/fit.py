"""Fitting a ResNet-50, and its widest layer, to images without training: seconds and peak memory.

Each in a process of its own.

64 images of 224 x 224 pixels in batches of 8, numbers at random: what they show changes no cost. Statistics of
BatchNorm come from some of them. All layers but the stem by spatial SVD at half of the multiply-adds, as
``hodec.compress(net, data=images, macs=0.5, method="spatial_svd", exclude="conv1")`` does it, in two parts.
"""

import time
from collections.abc import Iterator

import torch

import hodec
from benchmarks.child import in_child, peak_row
from benchmarks.rows import Row, Target, missing
from benchmarks.settings import Settings, not_installed
from hodec.calibration.fit import fit_layer
from hodec.calibration.moments import FitMoments
from hodec.calibration.output_gradients import TwoSided
from hodec.ranks import Budget

GROUP = "fit"
SECONDS, MEMORY = Target("<=", 180, "s"), Target("<=", 4 * 2**30, "B")
SIZES = {False: ("resnet50", 64, 224), True: ("resnet18", 8, 64)}  # quick or not: net, images, pixels a side
BATCH = 8


def fit(net: str, images: int, pixels: int) -> dict[str, float]:
    """CPU seconds of choosing ranks by the data, and of fitting to them."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(net, weights=None)
    data = list(torch.randn(images, 3, pixels, pixels).split(BATCH))
    with torch.no_grad():
        model.train()(data[0])
    model.eval()
    settings = {"method": "spatial_svd", "example_input": data[0][:1], "exclude": "conv1"}
    began = time.process_time()
    every = hodec.make_plan(model, 1, allow_larger=True, **settings)
    gradients = hodec.collect_output_gradients(model, every, data)
    covariances = hodec.collect_covariances(model, every, data)
    both = {name: TwoSided(covariances[name], one) for name, one in gradients.items()}
    weights = {name: one.importance for name, one in gradients.items()}
    plan = hodec.make_plan(model, Budget(macs=0.5, covariances=both, weights=weights), **settings)
    planned = time.process_time()
    roots = {name: one.root for name, one in gradients.items()}
    del covariances, both  # as ``hodec.compress`` does it
    hodec.fit_to_data(model, plan, data, output_roots=roots)
    return {"plan": planned - began, "fit": time.process_time() - planned, "layers": len(plan)}


def fit_wide(channels: int) -> float:
    """CPU seconds of fitting one 3x3 convolution at half rank to 7 x 7 positions of some 60 images."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(channels, channels, 3, padding=1))
    example = torch.zeros(1, channels, 7, 7)
    layer = hodec.make_plan(model, channels // 2, method="spatial_svd", example_input=example)["0"]
    weight = model.get_parameter("0.weight").detach()
    patches = torch.randn(9 * channels // 2 + 500, channels, 3, 3).relu() + 0.3 * torch.randn(1, channels, 1, 1)
    moments = FitMoments(layer.shape)
    moments.add(patches, patches.flatten(1) @ weight.flatten(1).mT)
    began = time.process_time()
    fit_layer(layer, weight, moments)
    return time.process_time() - began


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds of one wide layer; of the net seconds of both parts, and the memory of all."""
    channels = 64 if settings.quick else 512
    wide = in_child("benchmarks.fit:fit_wide", channels=channels)
    what = f"one {channels}x{channels}x3x3 layer, spatial SVD at half rank"
    if wide.problem:
        yield missing(GROUP, what, "", wide.problem)
    else:
        yield Row(GROUP, what, ours=wide.value, figure=wide.value, figure_unit="s", note="CPU time, once")
    yield from _net(settings)


def _net(settings: Settings) -> Iterator[Row]:
    net, images, pixels = SIZES[settings.quick]
    what = f"{net}, {images} images of {pixels} x {pixels}, spatial SVD at half of the multiply-adds"
    if problem := not_installed("torchvision"):
        yield missing(GROUP, what, "", problem)
        return
    done = in_child("benchmarks.fit:fit", limit=1800, net=net, images=images, pixels=pixels)
    if done.problem:
        yield missing(GROUP, what, "", done.problem)
        return
    for part, name, target in (("plan", "ranks by the data", None), ("fit", "fit", SECONDS)):
        seconds = done.value[part]
        note = f"CPU time, once; {done.value['layers']:.0f} layers"
        yield Row(GROUP, f"{what}: {name}", ours=seconds, figure=seconds, figure_unit="s", target=target, note=note)
    yield peak_row(GROUP, what, done, MEMORY)
