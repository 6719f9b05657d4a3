"""Ranks as Ascend's toolkit would choose them for its spatial split: EVBMF inside a narrow band, multiples of 16."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hodec.cost.count import Inputs
from hodec.errors import PlanError
from hodec.linalg.svd import naming, singular_values
from hodec.ranks.base import Candidate, Choice
from hodec.ranks.vbmf import signals

MULTIPLE = 16
# Rounding to a multiple takes away no more than this share of the rank.
MOST_CUT = 0.1
# From this many channels on (the smaller side), the band is a fourth of the full rank, below it a sixth.
WIDE, DIVIDE_WIDE, DIVIDE_NARROW = 256, 4, 6


class Ascend:
    """Ranks of Ascend's automatic decomposition, for ``method=spatial_svd``.

    EVBMF's rank is clamped to between a seventh and a sixth of the full rank (a fifth and a fourth from 256 channels
    on) and rounded to a multiple of 16, so the weights hardly matter. Layers that the toolkit would not touch stay
    dense, each with its reason.

    Source: Ascend AMCT documentation, automatic tensor decomposition, and its published rank table.
    """

    name = "ascend"
    reads_weights = True

    def __init__(self) -> None:
        self._model: nn.Module | None = None

    def bind(self, model: nn.Module, example_input: Inputs, method: str) -> None:
        """Remember the net, whose strides and dilations decide; it is not changed.

        Raises:
            PlanError: another method than ``spatial_svd``.
        """
        if method != "spatial_svd":
            raise PlanError(f"ranks=ascend chooses ranks for method=spatial_svd only, not for method={method}")
        self._model = model

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """One choice a layer.

        Raises:
            PlanError: not bound to a model.
        """
        if self._model is None:
            raise PlanError("ranks=ascend knows no strides yet: plan with hodec.make_plan, or call bind(..) first")
        model, self._model = self._model, None
        return {name: _one(candidate, model.get_submodule(name)) for name, candidate in candidates.items()}


def ascend_rank(matrix_or_singular_values: Tensor, out: int, inp: int, kh: int, kw: int) -> int:
    """Rank of the spatial split of a convolution (out, inp, kh, kw).

    Args:
        matrix_or_singular_values: the unfolding (min(kh, kw) min(out, inp), max(kh, kw) max(out, inp)), either way
            round, or its singular values, largest first.

    Raises:
        PlanError: a matrix of another shape, or more singular values than it has.
    """
    return _banded(_found(matrix_or_singular_values, out, inp, kh, kw), out, inp, kh, kw)[0]


def _found(given: Tensor, out: int, inp: int, kh: int, kw: int) -> int:
    """EVBMF's own rank, 0 for pure noise."""
    sides = (min(kh, kw) * min(out, inp), max(kh, kw) * max(out, inp))
    fits = len(given) <= sides[0] if given.ndim == 1 else tuple(sorted(given.shape)) == sides
    if not fits:
        raise PlanError(
            f"shape {tuple(given.shape)} is neither the {sides[0]}x{sides[1]} unfolding of a ({out}, {inp}, {kh}, "
            f"{kw}) kernel nor at most {sides[0]} singular values"
        )
    return signals(given if given.ndim == 1 else singular_values(given), *sides)


def _banded(found: int, out: int, inp: int, kh: int, kw: int) -> tuple[int, str]:
    """The rank for EVBMF's ``found``, and how it came about."""
    full = min(kh, kw) * min(out, inp)
    divide = DIVIDE_WIDE if min(out, inp) >= WIDE else DIVIDE_NARROW
    low, high = full // (divide + 1), full // divide
    clamped = min(max(found, low), high)
    nearest = (clamped + MULTIPLE // 2) // MULTIPLE * MULTIPLE
    if nearest < (1 - MOST_CUT) * clamped:
        nearest += MULTIPLE
    rank = min(max(MULTIPLE, nearest), full)
    return rank, f"VBMF's rank {found} became {rank}: band {low}..{high}, multiples of {MULTIPLE}"


@dataclass(frozen=True)
class Condition:
    """What a layer must satisfy; ``holds`` is asked of the layer and its kernel (out, in, height, width)."""

    holds: Callable[[nn.Conv2d, tuple[int, ...]], bool]
    otherwise: str


# In this order; the first that fails is the reason.
CONDITIONS = (
    Condition(lambda layer, _: type(layer) is nn.Conv2d, "it is not a plain 2-D convolution"),
    Condition(lambda layer, _: layer.groups == 1, "it is a grouped convolution"),
    Condition(lambda layer, _: set(layer.dilation) == {1}, "its dilation is not 1"),
    Condition(lambda layer, _: max(layer.stride) < 3, "its stride is 3 or more"),
    Condition(lambda _, shape: min(shape[2:]) > 2, "a side of its kernel is below 3"),
    Condition(lambda _, shape: min(shape[2:]) * min(shape[:2]) >= 16, "kernel side times channels is below 16"),
    Condition(lambda _, shape: min(shape[:2]) >= 64 or min(shape[2:]) >= 7, "it has fewer than 64 channels"),
    Condition(
        lambda layer, _: layer.weight.dtype in (torch.float16, torch.float32, torch.float64),
        "its weight is not float16, float32 or float64",
    ),
)


def _one(candidate: Candidate, layer: nn.Module) -> Choice:
    shape = candidate.site.shape
    for condition in CONDITIONS:
        if not condition.holds(layer, shape):  # type: ignore[arg-type]
            return Choice(None, reason=f"Ascend's decomposition leaves it alone: {condition.otherwise}")
    ((_, matrix),) = candidate.format.unfoldings(candidate.site.weight, candidate.modes)
    with naming(f"layer {candidate.name}"):
        rank, note = _banded(_found(matrix, *shape), *shape)
    return Choice((rank,), notes=(note,))
