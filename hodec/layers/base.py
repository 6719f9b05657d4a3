"""What every factorized layer has: built from a dense layer, and able to show the dense weight it stands for."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hodec.errors import ConvertError
from hodec.formats.base import Format, working_copy
from hodec.formats.layer_types import LayerType
from hodec.formats.modes import Modes


class FactorizedLayer(nn.Module):
    """Base of the factorized layers.

    Attributes:
        form: the format's mathematics for this kind of weight.
        kind: the kind of dense layer it stands in for.
        shape: shape of the dense weight with output channels first, (O, I, K_1, ..) or (O, I).
        modes, ranks: how the weight is split and factorized.
        execution: how inference computes it, one of ``form.executions``; training always uses the first.
    """

    format: ClassVar[Format]
    layer_type: ClassVar[LayerType]

    def __init__(self, shape: Sequence[int], *, ranks: Sequence[int], modes: Modes | None, execution: str) -> None:
        super().__init__()
        self.shape = tuple(shape)
        default = max(2, self.format.min_modes) if self.format.uses_modes else 1
        self.modes = modes or Modes.split(shape[1], shape[0], default)
        self.modes.check(shape[1], shape[0])
        self.ranks = self.format.check_ranks(self.shape, self.modes, ranks)
        execution = execution or self.format.executions[0]
        if execution not in self.format.executions:
            raise ConvertError(f"execution {execution!r} is not one of {', '.join(self.format.executions)}")
        self.execution = execution
        # what the cores merge to, the stamp of the weights it was made from, and those weights
        self._merged: tuple[object, tuple[Tensor, ...], list[Tensor]] | None = None

    @classmethod
    @abstractmethod
    def like(cls, module: Any, ranks: Sequence[int], *, modes: Modes | None = None, execution: str = "") -> Self:
        """The structure that stands in for ``module``, with random factors: enough to load saved ones into."""

    @classmethod
    def from_dense(
        cls,
        module: Any,
        ranks: Sequence[int],
        *,
        modes: Modes | None = None,
        execution: str = "",
        init_factors: Sequence[Tensor] | None = None,
    ) -> Self:
        """Factorize a dense layer: its weight at these ranks, its bias and settings as they are.

        Args:
            module: the dense layer; it is not changed.
            ranks: ranks in the format's order; see the layer's format for their number and limits.
            modes: how channels split; by default evenly, into two modes a side.
            execution: one of the format's executions, by default its first.
            start: factors of a weight nearby; formats found by iteration go on from them.

        Raises:
            RankError: ranks that do not fit.
            TrainingError: a weight with NaN or Inf.
        """
        weight = module.weight.detach()
        with same_random_state([weight]):
            layer = cls.like(module, ranks, modes=modes, execution=execution)
        with torch.autocast(weight.device.type, enabled=False):
            work = cls.layer_type.to_oihw(working_copy(weight))
            if init_factors is None:
                factors = cls.format.decompose(work, layer.ranks, layer.modes)
            else:
                factors = cls.format.refine(work, layer.ranks, layer.modes, init_factors)
            layer.load_factors(balance(factors))
        if isinstance(layer.bias, Tensor):
            layer.bias.data.copy_(module.bias.detach())
        layer.train(module.training)
        return layer

    @abstractmethod
    def factors(self) -> list[Tensor]:
        """The factors in the format's order and shapes, as views of the parameters."""

    @abstractmethod
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        """Overwrite the parameters by factors in the format's order and shapes."""

    def dense_weight(self) -> Tensor:
        """The dense weight that this layer applies, as the dense layer stores it."""
        return self.layer_type.from_oihw(self.format.reconstruct(self.factors(), self.shape, self.modes))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors whose dense weight has the variance of Kaiming's initialization, 2 / fan_in."""
        fan_in = self.shape[1] * _prod(self.shape[2:])
        # half precision could overflow before the gain is known
        factors = [torch.randn_like(f, dtype=torch.promote_types(f.dtype, torch.float32)) for f in self.factors()]
        dense = self.format.reconstruct(factors, self.shape, self.modes)
        scale = dense.square().mean().sqrt().clamp_min(1e-12)
        gain = ((2 / fan_in) ** 0.5 / scale) ** (1 / len(factors))
        self.load_factors([f * gain for f in factors])

    def extra_repr(self) -> str:
        out, inp, *kernel = self.shape
        size = "x".join(map(str, kernel))
        return f"{inp} -> {out}{', ' + size if size else ''}, ranks={list(self.ranks)}, execution={self.execution}"

    def running_execution(self) -> str:
        """The execution of the next call: training always merges, which is what keeps its steps cheap."""
        return self.format.executions[0] if self.training else self.execution

    def once_per_weights(self, merge: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``merge()``, remembered in inference until a parameter changes, so that serving merges only once."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return merge()
        weights = list(self.parameters())
        if any(w.is_inference() for w in weights):  # these do not count their changes
            return merge()
        stamp = tuple((w.data_ptr(), w._version, w.dtype) for w in weights)
        if self._merged is None or self._merged[0] != stamp:
            with torch.autocast(weights[0].device.type, enabled=False):  # or later calls would get its type
                merged = merge()
            # holding the weights keeps their addresses from being given to others
            self._merged = (stamp, merged, [w.detach() for w in weights])
        return self._merged[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_merged": None}  # copies and pickles merge anew

    def train(self, mode: bool = True) -> Self:
        self._merged = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._merged = None
        return super()._apply(fn, recurse)


def randomize_factors(model: nn.Module, *, seed: int) -> None:
    """Overwrite the factors of all factorized layers by seeded random ones; the global generators do not move."""
    with same_random_state(model.parameters()):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, FactorizedLayer):
                module.reset_parameters()


def balance(factors: Sequence[Tensor]) -> list[Tensor]:
    """Scale factors to equal root-mean-square entries; their product stays as it is.

    A decomposition leaves all of the norm in one factor, which gives the factors gradients of very different
    sizes and makes one learning rate fit none of them.
    """
    sizes = [f.square().mean().sqrt() for f in factors]
    if min(sizes) == 0:  # a zero weight: shrinking the other factors would leave nothing to learn from
        return list(factors)
    mean = torch.stack([s.log() for s in sizes]).mean().exp()
    return [f * (mean / s) for f, s in zip(factors, sizes, strict=True)]


def same_random_state(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A context whose draws do not move the global generators (of the CPU and of these tensors' devices)."""
    devices = {t.device.index for t in tensors if t.is_cuda}
    return torch.random.fork_rng(devices=sorted(devices))


def _prod(numbers: Sequence[int]) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result
