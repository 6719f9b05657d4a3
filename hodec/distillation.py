"""Feature distillation: each factorized layer learns the output of the dense layer that it stands in for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hodec.errors import ConfigError, near_matches
from hodec.layers.base import FactorizedLayer


class FeatureDistillation:
    """How far the outputs of a student's layers are from those of its teacher's, in the last forward pass of each:

        features = hodec.FeatureDistillation(small, dense)
        with torch.no_grad():
            dense(x)
        loss = cross_entropy(small(x), y) + features.loss()
        ...
        features.remove()

    It only hooks onto both nets, whose forward passes stay as they are. A layer counts by |s - t|^2 / |t|^2 over the
    batch, its calls together, and all layers count alike.

    Args:
        student: the factorized net.
        teacher: a net whose layers of the same names have outputs of the same sizes: the dense one.
        layers: names of modules, such as the blocks of a ResNet; by default the factorized layers that are called.

    Raises:
        ConfigError: a layer that one of the nets lacks, or none to compare.

    Source: Romero et al., FitNets, ICLR 2015; for decomposed nets Lin, Hsu et al., Holistic CNN Compression via
    Low-Rank Decomposition with Knowledge Transfer, TPAMI 2019: section 3.3.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> small, x = hodec.convert(net, plan), torch.randn(8, 64)
        >>> features = hodec.FeatureDistillation(small, net)
        >>> outputs = net(x), small(x)
        >>> 0 < features.loss().item() < 1
        True
        >>> features.remove()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Sequence[str] | None = None) -> None:
        own, theirs = dict(student.named_modules()), dict(teacher.named_modules())
        found = [name for name, module in own.items() if isinstance(module, FactorizedLayer) and name in theirs]
        self.layers = list(found if layers is None else layers)
        if not self.layers:
            raise ConfigError("there is no factorized layer whose name the teacher has: name the layers to compare")
        for name in self.layers:
            for what, modules in (("student", own), ("teacher", theirs)):
                if name not in modules:
                    raise ConfigError(f"the {what} has no layer {name!r}.{near_matches(name, [*modules])}")
        self._seen: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = ({}, {})
        self._hooks = [  # a pass forgets what others left: a test, or checkpointed layers that ran again in backward
            net.register_forward_pre_hook(partial(_forget, seen))
            for net, seen in zip((student, teacher), self._seen, strict=True)
        ]
        self._hooks += [
            modules[name].register_forward_hook(self._keeper(name, seen))
            for modules, seen in zip((own, theirs), self._seen, strict=True)
            for name in self.layers
        ]

    def _keeper(self, name: str, seen: dict[str, list[Tensor]]) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: object) -> None:
            if module.training or seen is self._seen[1]:  # a validation pass leaves nothing behind
                seen.setdefault(name, []).append(cast(Tensor, output[0] if isinstance(output, tuple) else output))

        return keep

    def loss(self) -> Tensor:
        """The mean over the layers, a scalar with gradients of the student; what was seen is forgotten.

        Raises:
            ConfigError: no layer was called in both nets since the last time, or outputs differ in size.
        """
        mine, theirs = self._seen
        distances = [
            sum(_distance(name, s, t) for s, t in zip(mine[name], theirs[name], strict=True)) / len(theirs[name])
            for name in self.layers
            if len(mine.get(name, ())) == len(theirs.get(name, ())) > 0
        ]
        mine.clear()
        theirs.clear()
        if not distances:
            raise ConfigError("no layer was called as often in the student as in the teacher: run both on the batch")
        return torch.stack([cast(Tensor, one) for one in distances]).mean()

    def remove(self) -> None:
        """Take the hooks off both nets."""
        for hook in self._hooks:
            hook.remove()


def _forget(seen: dict[str, list[Tensor]], module: nn.Module, args: object) -> None:
    seen.clear()


def _distance(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise ConfigError(
            f"layer {name}: outputs of {tuple(student.shape)} and {tuple(teacher.shape)}; compare layers of equal size"
        )
    wanted = teacher.detach().float()
    return (student.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
