"""The cases of the contract: every method of METHODS, for every kind of layer it has, with 1 to 3 modes a side."""

from dataclasses import dataclass

import pytest
import torch
from small_nets import KERNELS, dense_layer
from torch import Tensor, nn

from hodec.formats.base import Format
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.layers.base import FactorizedLayer
from hodec.methods import METHODS

# Dense weights by kind, output channels first.
CHANNELS = {kind: (12, 8, *kernel) for kind, kernel in KERNELS.items()}
SIDES = (7, 9, 5)


@dataclass(frozen=True)
class Case:
    """One method for one kind of layer at one number of modes; ``shape`` is a dense weight's."""

    method: str
    layer_type: str
    modes: Modes

    @property
    def cls(self) -> type[FactorizedLayer]:
        return METHODS[self.method].layers[self.layer_type]

    @property
    def format(self) -> Format:
        return METHODS[self.method].format(self.layer_type)

    @property
    def shape(self) -> tuple[int, ...]:
        return CHANNELS[self.layer_type]

    def ranks(self, cap: int, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Ranks of at most ``cap``."""
        shape = shape or self.shape
        most = self.format.max_ranks(shape, self.modes)
        return self.format.fit_ranks(shape, self.modes, [cap] * len(most))

    def weight(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def dense(self, dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
        """A dense layer of this case's channels."""
        out, inp = self.shape[:2]
        if self.layer_type == "embedding":
            settings = {"padding_idx": 1}
        return dense_layer(self.layer_type, inp, out, settings.pop("kernel_size", ()), **settings).to(dtype)

    def layer(self, dense: nn.Module, cap: int = 3, execution: str = "") -> FactorizedLayer:
        ranks = self.ranks(cap, tuple(LAYER_TYPES[self.layer_type].to_oihw(dense.weight).shape))
        return self.cls.from_dense(dense, ranks, modes=self.modes, execution=execution)

    def input(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """What the dense layer takes."""
        generator = torch.Generator().manual_seed(seed)
        if self.layer_type == "embedding":
            return torch.randint(0, self.shape[1], (2, 5), generator=generator)
        shape = (2, 8, *SIDES[: LAYER_TYPES[self.layer_type].dims]) if LAYER_TYPES[self.layer_type].dims else (2, 5, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# A layer that several methods share is tried once.
FIRST = {
    layer: (name, layer_type) for name, m in reversed(list(METHODS.items())) for layer_type, layer in m.layers.items()
}
CASES = [
    Case(name, layer_type, Modes.split(CHANNELS[layer_type][1], CHANNELS[layer_type][0], d))
    for name, layer_type in sorted(FIRST.values())
    for d in (
        range(METHODS[name].format(layer_type).min_modes, 4) if METHODS[name].format(layer_type).uses_modes else (1,)
    )
]


def _id(case: Case) -> str:
    return f"{case.method}-{case.layer_type}-d{len(case.modes.inputs)}"


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    """Slow where its code is that of another case: three modes repeat two, and one or three axes repeat a plane's.

    The formats that treat the axes or the modes one by one are tried with other numbers of them.
    """
    count, planar = len(case.modes.inputs), LAYER_TYPES[case.layer_type].dims in (0, 2)
    tried = {"tt": count == 2, "cp": not LAYER_TYPES[case.layer_type].transposed}
    fast = count <= 2 if planar else tried.get(case.method, False)
    return [] if fast or (case.method, case.layer_type) == ("tt", "conv2d") else [pytest.mark.slow]


every_case = pytest.mark.parametrize("case", [pytest.param(case, id=_id(case), marks=_marks(case)) for case in CASES])
every_execution = pytest.mark.parametrize(
    ("case", "execution"),
    [
        pytest.param(case, execution, id=f"{_id(case)}-{execution}", marks=_marks(case))
        for case in CASES
        for execution in case.format.executions
    ],
)


def relative(a: Tensor, b: Tensor) -> float:
    """norm(a - b) / norm(b)."""
    return float((a - b).detach().norm() / b.detach().norm())
