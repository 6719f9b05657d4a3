"""The largest kernels of common nets: seconds and peak memory of (2048, 2048, 5, 5), each in a process of its own.

Beside it stands nothing: SVDs of this kernel take minutes. The kernel itself is 400 MiB.
"""

from collections.abc import Iterator
from math import prod

import torch

from benchmarks import work
from benchmarks.child import Outcome, in_child, peak_row
from benchmarks.kernels import half_ranks, kernel
from benchmarks.rows import Row, Target, in_unit, missing
from benchmarks.settings import Settings
from hodec.formats import svd, tt, tucker
from hodec.formats.base import Format
from hodec.formats.modes import Modes

GROUP = "big"
SECONDS, MEMORY = Target("<=", 20, "s"), Target("<=", 2 * 2**30, "B")

FORMS: dict[str, Format] = {"tensor train": tt.CONV, "Tucker-2": tucker.CONV, "spatial split": svd.SPATIAL_SVD}
JUDGED = ("tensor train", "Tucker-2")


def setting(name: str, shape: tuple[int, ...]) -> tuple[Modes, tuple[int, ...], work.Work]:
    """Modes, ranks and least work of a decomposition at half rank."""
    (out, inp, *sides), one = shape, Modes.split(shape[1], shape[0], 1)
    if name == "tensor train":
        modes, ranks = half_ranks(shape)
        return modes, ranks, work.tensor_train(tt.CONV.tensor_shape(shape, modes), ranks)
    if name == "Tucker-2":
        return one, (inp // 2, out // 2), work.tucker(shape, (inp // 2, out // 2))
    # rank 2048 of a 2048-channel kernel whatever the size of its sides
    return one, (min(out, inp),), work.truncation(out * sides[0], inp * sides[1], min(out, inp))


@torch.no_grad()
def decompose(name: str, shape: list[int]) -> float:
    """Numbers in the factors; what the parent measures."""
    modes, ranks, _ = setting(name, tuple(shape))
    factors = FORMS[name].decompose(kernel(*shape[:3]), ranks, modes)
    return float(sum(factor.numel() for factor in factors))


def make_only(shape: list[int]) -> float:
    """The kernel alone: what of the seconds and of the memory is not the decomposition's."""
    return float(kernel(*shape[:3]).numel())


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds and memory of each form."""
    shape = (256, 256, 5, 5) if settings.quick else (2048, 2048, 5, 5)
    bare = in_child("benchmarks.big:make_only", shape=shape)
    for name in FORMS:
        done = in_child("benchmarks.big:decompose", name=name, shape=shape)
        what = f"{name} of {'x'.join(map(str, shape))}, rank {_rank(name, shape)}"
        if done.problem or bare.problem:
            yield missing(GROUP, what, "", done.problem or bare.problem)
            continue
        yield from _measured(what, name, shape, done, bare, settings)


def _measured(  # noqa: PLR0913
    what: str, name: str, shape: tuple[int, ...], done: Outcome, bare: Outcome, settings: Settings
) -> Iterator[Row]:
    least, judged = setting(name, shape)[2], name in JUDGED
    seconds = max(done.seconds - bare.seconds, 1e-9)
    yield Row(
        GROUP,
        f"{what}: seconds",
        ours=seconds,
        figure=seconds,
        figure_unit="s",
        target=SECONDS if judged else None,
        limit=settings.ceilings.limit(seconds, flops=least.flops, nbytes=least.nbytes),
        note=f"once, without the {bare.seconds:.1f} s that making the kernel takes",
    )
    kernel_bytes, bare_peak = (in_unit(value, "B") for value in (4 * prod(shape), bare.peak))
    more = f", the kernel among them ({kernel_bytes}); making the kernel alone peaks at {bare_peak}"
    yield peak_row(GROUP, what, done, MEMORY if judged else None, more)


def _rank(name: str, shape: tuple[int, ...]) -> str:
    return "half" if name in JUDGED else str(min(shape[:2]))
