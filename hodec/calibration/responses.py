"""What a layer in front of a ReLU is to give: outputs that are negative in the dense net only have to stay negative.

With z the dense net's input of the ReLU and z' the small one's, the loss is the convex function

    (z - z')^2 where z > 0,    max(z', 0)^2 elsewhere

which is never less than (max(z, 0) - max(z', 0))^2. It is lowered by turns: with z' of the last fit, the wanted value
becomes z where z > 0, and min(z', 0) elsewhere; then least squares again. Only wanted values change, and inputs do
not, so that a turn costs one product of the kept rows.

Source: Zhang, Zou, He, Sun, Accelerating Very Deep Convolutional Networks, TPAMI 2016: section 2.3, whose penalty
decomposition needs a weight that rises; this bound needs none.
"""

import copy

import torch
from torch import Tensor

from hodec.calibration.fit import Fit
from hodec.calibration.moments import FitMoments
from hodec.calibration.sites import back

# Numbers kept of the patches of one layer, in float32 256 MiB; rows beyond stand in the moments alone.
KEPT = 2**26


class Responses:
    """Rows of a layer's patches and of what is wanted behind it.

    Args:
        scale, shift: (O,) what happens between the layer and the sum or ReLU behind it.
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift
        self.rows: list[tuple[Tensor, Tensor, Tensor, Tensor | float]] = []
        self.numbers = 0

    def add(self, x: Tensor, wanted: Tensor, z: Tensor, beside: Tensor | float) -> None:
        """Keep rows, if there is room.

        Args:
            x: patches (M, I, K_1, ..) in the small net.
            wanted: outputs (M, O) that the layer is fitted to at first.
            z: (M, O) what goes into the ReLU in the dense net.
            beside: (M, O) what is added to the layer's output in the small net, behind scale and shift.
        """
        if self.numbers + x.numel() <= KEPT:
            self.numbers += x.numel()
            self.rows.append((x.flatten(1).float().cpu(), wanted, z, beside))

    def towards(self, fit: Fit, moments: FitMoments) -> FitMoments:
        """The moments with what is wanted after this fit; kept rows stand for all."""
        changed, kept = copy.copy(moments), sum(len(x) for x, *_ in self.rows)
        share, step = moments.count / max(1, kept), back(self.scale)
        weight, bias = fit.weight.float().flatten(1).mT, fit.bias.float()
        y, yy, yx = torch.zeros_like(moments.y), torch.zeros_like(moments.yy), torch.zeros_like(moments.yx)
        for x, wanted, z, beside in self.rows:
            given = x @ weight + bias
            near = given * self.scale + self.shift + beside
            new = given + (torch.where(z > 0, z, near.clamp_max(0)) - near) * step
            more = new - wanted
            y += more.sum(0)
            yy += (new.square() - wanted.square()).sum(0)
            yx += more.mT.to(x.dtype) @ x  # those of a float64 net are not
        changed.y, changed.yy, changed.yx = moments.y + share * y, moments.yy + share * yy, moments.yx + share * yx
        return changed
