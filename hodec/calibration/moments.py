"""Sums over calibration data of what a least-squares fit of one layer needs: the data are not kept."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hodec.errors import DataError, TrainingError


class FitMoments:
    """First and second moments of a layer's patches and of the outputs that are wanted there, in float64.

    Args:
        shape: of the weight that is fitted, (O, I, K_1, ..).
        constant: whether a bias is fitted along with the weight; without, moments are not centred.

    With n = I * K_1 * .. numbers in a patch and O outputs this takes 8 n (n + O) bytes, however many data are added.

    Attributes:
        count: rows that were added.
        x, y: sums of patches, (n,), and of outputs, (O,).
        xx, yx: sums of their products, (n, n) and (O, n); of the first the lower triangle, and not all of the upper.
        yy: sums of squares of outputs, (O,).
        rounding: of the products, as a share of the mean square; what is left of it where means are taken off.
    """

    def __init__(self, shape: Sequence[int], *, constant: bool = True) -> None:
        out, inputs = shape[0], math.prod(shape[1:])
        self.shape, self.constant, self.count = tuple(shape), constant, 0
        self.x, self.y = (torch.zeros(n, dtype=torch.float64) for n in (inputs, out))
        self.xx, self.yx = (torch.zeros(n, inputs, dtype=torch.float64) for n in (inputs, out))
        self.yy = torch.zeros(out, dtype=torch.float64)
        self.rounding = 1e-15

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows.

        Args:
            x: patches (M, I, K_1, ..) that the layer meets in the net as it is compressed so far.
            y: outputs (M, O) that the dense layer gives there in the dense net, bias included.

        Raises:
            DataError: rows of other sizes, or not as many of both.
        """
        if x.shape[1:] != self.shape[1:] or y.shape != (len(x), self.shape[0]):
            raise DataError(
                f"patches {tuple(x.shape)} and outputs {tuple(y.shape)} given; allowed for a weight {self.shape}: "
                f"patches (M, {', '.join(map(str, self.shape[1:]))}) and outputs (M, {self.shape[0]})"
            )
        rows, wanted = x.flatten(1).cpu(), y.cpu()
        if rows.dtype != torch.float64:  # products in float32, at twice the speed; their sums in float64
            rows, self.rounding = rows.float(), 1e-7
        wanted = wanted.to(rows.dtype)
        self.count += len(rows)
        self.x += rows.sum(0)
        self.y += wanted.sum(0)
        for at in self._blocks():  # the lower half; a product of the whole size would be paged in anew each time
            self.xx[at, : at.stop] += rows[:, at].mT @ rows[:, : at.stop]
        self.yx += wanted.mT @ rows
        self.yy += wanted.square().sum(0)

    def covariance(self) -> Tensor:
        """Second moments of patches about their mean, (n, n).

        Raises:
            DataError: nothing was added.
            TrainingError: NaN or Inf among what was added.
        """
        x, _ = self.means()
        made = torch.empty_like(self.xx)
        for at in self._blocks():
            low = self.xx[at, : at.stop] / self.count
            made[at, : at.stop] = low.sub_(torch.outer(x[at], x[: at.stop]))  # not addr_: one row leaves exact zeros
            made[: at.start, at] = made[at, : at.start].mT
        return made

    def _blocks(self, size: int = 256) -> Iterator[slice]:
        """Rows of the products of patches that are worked on together."""
        yield from (slice(k, min(k + size, len(self.xx))) for k in range(0, len(self.xx), size))

    def cross_covariance(self) -> Tensor:
        """Second moments of outputs with patches about their means, (O, n); errors as of ``covariance``."""
        x, y = self.means()
        return (self.yx / self.count).sub_(torch.outer(y, x))

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments about the means: of patches (n, n), of outputs with patches (O, n), and of
        outputs alone (O,).

        Raises:
            DataError: nothing was added.
            TrainingError: NaN or Inf among what was added.
        """
        _, y = self.means()
        return self.covariance(), self.cross_covariance(), self.yy / self.count - y.square()

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean patch (n,) and mean output (O,); zeros where no constant is fitted.

        Raises:
            DataError: nothing was added.
            TrainingError: NaN or Inf among what was added.
        """
        if not self.count:
            raise DataError("a layer is to be fitted to no data: the net never calls it on these batches")
        # NaN and Inf of any row are in a diagonal
        if not all(bool(sums.isfinite().all()) for sums in (self.xx.diagonal(), self.yy)):
            raise TrainingError(
                "calibration data give NaN or Inf at a layer; look at the data and the layers before it"
            )
        share = 1 / self.count if self.constant else 0.0
        return self.x * share, self.y * share
