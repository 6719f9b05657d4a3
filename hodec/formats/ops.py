"""Op: one convolution or matrix product of a factorized layer.

A format lists the ops of its layer once for each execution. From that list follow its parameters and multiply-adds
(here), the forward pass (``layers``), plain modules (``fusion``), latency probes (``cost``) and ONNX nodes
(``onnx_graph``).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from hodec.formats.calls import CallSites

Shape = Sequence[int]

# Multiply-adds per second of a chain of small contractions, relative to merged convolutions, on a CPU: a chain is
# chosen only where it saves more multiply-adds than that. ``fuse`` measures both. benchmarks/chain.py: 0.4 at 64
# channels, 0.7 at 256, 0.9 at 512.
CHAIN_RATE = 0.75


class Op(NamedTuple):
    """One convolution, or one matrix product where the weight has no spatial axes.

    An op of a chain contracts one input mode, makes one output mode, or does both: it reads r i channels and writes
    o s channels, for the rank r before it and the rank s behind it. It carries along the output modes that are done
    and the input modes that are still pending, so it runs ``done * pending`` times for each position.

    Attributes:
        kernel: shape (out, in / groups, K_1, ..), whatever the dense layer stores; (out, in) without spatial axes.
        axes: spatial axes along which it moves; it has the layer's stride, padding and dilation along these.
        depthwise: whether it convolves each channel on its own; its kernel is (channels, 1, K_1, ..).
        takes: the input mode i that it contracts, 0 where it contracts none.
        gives: the output mode o that it makes, 0 where it makes none.
        pending: product of the input modes that later ops contract.
        done: product of the output modes that earlier ops made.
        entries: number of kernels of which each token picks one, 0 where nothing is looked up.
        blocks: groups of the layer, each of which has an equal share of the channels and of the kernel's rows.
    """

    kernel: tuple[int, ...]
    axes: tuple[int, ...] = ()
    depthwise: bool = False
    takes: int = 0
    gives: int = 0
    pending: int = 1
    done: int = 1
    entries: int = 0
    blocks: int = 1

    @property
    def contracts(self) -> bool:
        """Whether it is a contraction of a chain."""
        return bool(self.takes or self.gives)

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self.kernel[0] if self.depthwise else self.blocks

    @property
    def channels(self) -> int:
        """Channels that it reads."""
        return self.kernel[1] * self.groups

    @property
    def params(self) -> int:
        """Elements of its kernels."""
        return math.prod(self.kernel) * max(1, self.entries)

    @property
    def work(self) -> int:
        """Multiply-adds for one position."""
        return math.prod(self.kernel) * self.done * self.pending

    def then(self, other: "Op") -> "Op":
        """One op that does the work of this one and of its successor."""
        inp = (other if self.depthwise else self).kernel[1]
        sides = (a * b for a, b in zip(self.kernel[2:], other.kernel[2:], strict=True))
        axes = tuple(sorted({*self.axes, *other.axes}))
        depthwise = self.depthwise and other.depthwise
        return Op((other.kernel[0], inp, *sides), axes, depthwise, blocks=self.blocks)


def total_params(ops: Sequence[Op]) -> int:
    """Elements of all kernels."""
    return sum(op.params for op in ops)


def total_macs(ops: Sequence[Op], call_sites: CallSites, *, transposed: bool) -> int:
    """Multiply-adds of one image, each op at the resolution it works at.

    A convolution visits its output positions, a transposed one its input positions; an axis has its output size once
    the op that moves along it is done. The first op of an embedding is looked up and multiplies nothing.
    """
    total, moved = 0, set[int]()
    after = call_sites.positions(moved)
    for k, op in enumerate(ops):
        before = after
        if op.axes:
            moved |= {*op.axes}
            after = call_sites.positions(moved)
        if k or not op.entries:
            total += op.work * (before if transposed else after)
    return total


def spatial_axes(shape: Shape) -> tuple[int, ...]:
    """All spatial axes of a kernel (O, I, K_1, ..)."""
    return tuple(range(len(shape) - 2))


def dense_op(shape: Shape, groups: int = 1) -> Op:
    """The dense layer of a weight (O, I / groups, K_1, ..)."""
    return Op(tuple(shape), spatial_axes(shape), blocks=groups)


def pointwise(out: int, inp: int, shape: Shape) -> Op:
    """A 1x1 convolution, or a product, among the ops of a weight of this shape."""
    return Op((out, inp, *(1 for _ in shape[2:])))
