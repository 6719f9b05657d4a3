"""Feature distillation: each factorized layer learns the output of the dense layer that it stands in for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from hodec.errors import ConfigError, near_matches
from hodec.inference import InertHook, modules_by_name
from hodec.layers.base import FactorizedLayer


class FeatureDistillation:
    """How far the outputs of a student's layers are from those of its teacher's, in the last forward pass of each:

        features = hodec.FeatureDistillation(small, dense)
        with torch.no_grad():
            dense(x)
        loss = cross_entropy(small(x), y) + features.loss()
        ...
        features.remove()

    It only hooks onto both nets, whose forward passes stay as they are; copies of them take no part. A layer counts by
    |s - t|^2 / |t|^2 over the batch, its calls together, and all layers count alike. What the layer gave is compared,
    also where an in-place ReLU stands behind it. The student's passes in evaluation mode without gradients are left
    out.

    Args:
        student: the factorized net.
        teacher: a net whose layers of the same names have outputs of the same sizes: the dense one.
        layers: names of modules, such as the blocks of a ResNet; by default the factorized layers that are called.

    Raises:
        ConfigError: a layer that one of the nets lacks, or none to compare; in a forward pass, an output that is no
            tensor.

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

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: str | Sequence[str] | None = None) -> None:
        own, theirs = modules_by_name(student), modules_by_name(teacher)
        found = [name for name, module in own.items() if isinstance(module, FactorizedLayer) and name in theirs]
        self.layers = [layers] if isinstance(layers, str) else list(found if layers is None else layers)
        if not self.layers:
            raise ConfigError("there is no factorized layer whose name the teacher has: name the layers to compare")
        for name in self.layers:
            for what, modules in (("student", own), ("teacher", theirs)):
                if name not in modules:
                    raise ConfigError(f"the {what} has no layer {name!r}.{near_matches(name, [*modules])}")
        self._seen = _Outputs(), _Outputs(is_teacher=True)
        self._hooks = []
        for modules, seen in zip((own, theirs), self._seen, strict=True):
            self._hooks.append(modules[""].register_forward_pre_hook(_Forget(modules[""], seen)))
            self._hooks += [
                modules[name].register_forward_hook(_Keep(modules[name], name, seen)) for name in self.layers
            ]

    def loss(self) -> Tensor:
        """The mean over the layers, a scalar with gradients of the student; what was seen is forgotten.

        Raises:
            ConfigError: no layer was called in both nets since the last time, or outputs differ in size.
        """
        mine, theirs = (seen.taken() for seen in self._seen)
        distances = [
            sum(_distance(name, s, t) for s, t in zip(mine[name], theirs[name], strict=True)) / len(theirs[name])
            for name in self.layers
            if len(mine.get(name, ())) == len(theirs.get(name, ())) > 0
        ]
        if not distances:
            raise ConfigError("no layer was called as often in the student as in the teacher: run both on the batch")
        return torch.stack([cast(Tensor, one) for one in distances]).mean()

    def remove(self) -> None:
        """Take the hooks off both nets."""
        for hook in self._hooks:
            hook.remove()


@dataclass(eq=False)
class _Outputs:
    """What the layers of a net gave in its last pass.

    What stands behind a layer may write over its output. So the first outputs are copied, and the original is looked
    at when they are taken: from then on only what is written over is copied, which takes time.

    Attributes:
        kept: layer -> its outputs, one a call.
        given: layer -> the tensors themselves, and how often they had been written to.
        is_overwritten: layer -> whether something writes over its output.
    """

    is_teacher: bool = False
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    given: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    is_overwritten: dict[str, bool] = field(default_factory=dict)

    def keep(self, name: str, output: Tensor) -> None:
        """Add the output of a call."""
        # a compiled pass, where a copy costs next to nothing, and inference mode do not count what is written
        counted = not torch.compiler.is_compiling() and not output.is_inference()
        copied = self.is_overwritten.get(name, True) or not counted
        self.kept.setdefault(name, []).append(output.clone() if copied else output)
        if counted:
            self.given.setdefault(name, []).append((output, output._version))

    def taken(self) -> dict[str, list[Tensor]]:
        """Layer -> its outputs, which are forgotten here.

        Raises:
            ConfigError: one was written over that never was before.
        """
        for name, calls in self.given.items():
            written = any(output._version != version for output, version in calls)
            if written and not self.is_overwritten.get(name, True):
                raise ConfigError(f"layer {name}: what follows writes over its output now: give that inplace=False")
            self.is_overwritten.setdefault(name, written)
            if not written:  # not the first copies: gradients would be summed in another order than later
                self.kept[name] = [output for output, _ in calls]
        kept = self.kept
        self.clear()
        return kept

    def clear(self) -> None:
        """Forget what the last pass left."""
        self.kept, self.given = {}, {}


class _Hook:
    """A hook of one module; in copies of the module, and in files, it does nothing."""

    def __init__(self, module: nn.Module, seen: _Outputs) -> None:
        self.module, self.seen = module, seen

    def __reduce__(self) -> tuple[object, ...]:
        return (InertHook, ())


class _Forget(_Hook):
    """A pass forgets what others left: a test, or checkpointed layers that ran again in backward."""

    def __call__(self, module: nn.Module, args: object) -> None:
        if module is self.module:
            self.seen.clear()


class _Keep(_Hook):
    """Keeps what a layer gives; a validation pass leaves nothing behind."""

    def __init__(self, module: nn.Module, name: str, seen: _Outputs) -> None:
        super().__init__(module, seen)
        self.name = name

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if module is not self.module or not (self.seen.is_teacher or module.training or torch.is_grad_enabled()):
            return
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            kind = type(first).__name__
            raise ConfigError(
                f"layer {self.name}: its output is a {kind}; compared are tensors, and tuples that begin with one"
            )
        self.seen.keep(self.name, first)


def _distance(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise ConfigError(
            f"layer {name}: outputs of {tuple(student.shape)} and {tuple(teacher.shape)}; compare layers of equal size"
        )
    wanted = teacher.detach().float()
    return (student.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
