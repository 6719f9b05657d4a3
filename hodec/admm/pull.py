"""The pull: how the planned weights are moved towards Z - U, and how far they really got."""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from hodec.admm.binding import Binding
from hodec.admm.division import part_of
from hodec.admm.penalty import StepSize
from hodec.admm.projection import State
from hodec.admm.updates import full_precision

# A few numbers of each gradient are compared at the step with what they were when the pull was added: this many, at
# the first steps after a Z-update and then at every eighth, so that looking costs next to nothing.
SAMPLE, SAMPLED_STEPS = 64, 8

# Types of weights in which small steps are lost in rounding.
COARSE = (torch.bfloat16, torch.float16)

# Share of the gradients below which they count as clipped.
CLIPPED = 0.9


class Pull:
    """Moves the planned weights towards Z - U, in their gradients or by itself, and measures how far.

    Args:
        binding: the weights and what trains them.
        movable: rho follows a wanted pull, so that the weights may be moved themselves, which is exact whatever the
            optimizer makes of gradients.
        clipped: gradients are known to be clipped after ``add``.
        summed: adds up numbers over the processes that hold parts of the weights.

    Attributes:
        decoupled: whether the weights are moved themselves.
        known: whether rho tells how far it pulls: within the gradients of Adam and its like it does not.
        kept: share of the gradients that came through to the optimizer at the last look; 1 where nothing clips them.
        steps: optimizer steps since the last ``restart``; empty ones, without any gradient, are not counted.
    """

    def __init__(
        self,
        binding: Binding,
        *,
        movable: bool,
        clipped: bool = False,
        summed: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.binding, self._summed = binding, summed
        # In 8 bits of mantissa a weight does not move by less than 1 part in 256 or so: what a step asks for is lost.
        coarse = any(w.dtype in COARSE for w in binding.weights.values())
        self.decoupled = movable and (clipped or coarse or not binding.is_sgd)
        self.known = self.decoupled or (binding.is_sgd and not coarse)
        self.rest = dict[str, Tensor]()  # layer -> what rounding has kept its weight from being moved, in float32
        self.kept, self.steps, self._uncounted = 1.0, 0, 0
        self._way = dict.fromkeys(binding.weights, 0.0)  # -log of the share of its way that a layer has left
        self._added: dict[str, tuple[float, Tensor]] = {}  # layer -> rho and gradient of the step to come
        self._seen: Tensor | None = None
        this = weakref.ref(self)
        self._hooks = [owner.register_step_post_hook(lambda o, *_: _tell(this, o)) for owner in binding.owners]

    def release(self) -> None:
        """Look at the optimizers no longer."""
        for hook in self._hooks:
            hook.remove()

    def size(self, name: str, steps: float) -> StepSize:
        """What decides how far a layer moves in ``steps`` optimizer steps, at its learning rate of now."""
        group = self.binding.group(name)
        momentum, dampening = (
            0.0 if self.decoupled else float(group.get(key, 0.0)) for key in ("momentum", "dampening")
        )
        return StepSize(float(group["lr"]), momentum, steps, self.decoupled, dampening)

    def rates(self) -> dict[str, float]:
        """Learning rate of each layer now."""
        return {name: float(self.binding.group(name)["lr"]) for name in self.binding.weights}

    def add(self, targets: Mapping[str, Tensor], rho: Mapping[str, float]) -> list[str]:
        """Add rho (W - Z + U) to the gradients; returns the layers that have none.

        Args:
            targets: layer -> Z - U.
        """
        weights = self.binding.weights
        grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
        if grads and any(g is not self._added.get(n, (0.0, None))[1] for n, g in grads.items()):  # else it is in them
            signs = {name: -1 if self.binding.group(name).get("maximize") else 1 for name in grads}
            offsets = self._offsets(targets, {name: signs[name] * rho[name] for name in grads})
            torch._foreach_add_(tuple(map(part_of, grads.values())), tuple(offsets))
            self._added = {name: (rho[name], grad) for name, grad in grads.items()}
            due = self.steps < SAMPLED_STEPS or self.steps % SAMPLED_STEPS == 0
            self._seen = _sample(grads.values()) if due else None
        return [name for name in weights if name not in grads]

    @torch.no_grad()
    def move(self, targets: Mapping[str, Tensor], rho: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Move the weights by rho times the learning rate, the share of their way that one step covers."""
        ratios = {name: min(1.0, rates[name] * rho[name]) for name in self.binding.weights}
        weights = [part_of(self.binding.weights[name].data) for name in ratios]
        exact = {name: w for name, w in zip(ratios, weights, strict=True) if w.dtype not in COARSE}
        if exact:
            torch._foreach_sub_(tuple(exact.values()), self._offsets(targets, {name: ratios[name] for name in exact}))
        for (name, ratio), w in zip(ratios.items(), weights, strict=True):
            if name not in exact:
                wanted = full_precision(w) + self.rest.get(name, 0.0)
                wanted -= ratio * (wanted - targets[name])
                w.copy_(wanted)
                self.rest[name] = wanted - full_precision(w)
            self._way[name] += _way(ratio)

    def _offsets(self, targets: Mapping[str, Tensor], factors: Mapping[str, float]) -> list[Tensor]:
        """factor * (W - Z + U) of each layer, in the weight's type."""
        weights = [part_of(self.binding.weights[name]) for name in factors]
        offsets = torch._foreach_sub([full_precision(w) for w in weights], [targets[name] for name in factors])
        torch._foreach_mul_(offsets, list(factors.values()))
        return [offset.to(w.dtype) for offset, w in zip(offsets, weights, strict=True)]

    # -- what happened -------------------------------------------------------------------------------------------

    def counted(self) -> int:
        """The optimizer steps since this was last asked; what was added for one that a loss scaler skipped is gone."""
        steps, self._uncounted, self._added = self._uncounted, 0, {}
        return steps

    def stepped(self, owner: Optimizer) -> None:
        """Take note that an optimizer has stepped."""
        added, self._added = self._added, {}
        if all(p.grad is None for group in owner.param_groups for p in group["params"]):
            return
        if owner is self.binding.owners[0]:
            self._uncounted += 1
            self.steps += 1
        if added and self._seen is not None:
            self.kept = _left_of(self._seen, _sample([grad for _, grad in added.values()]), self._summed)
        for name, (rho, _) in added.items():
            self._way[name] += self.kept * _way(self.size(name, 1).pull(rho))

    def measured(self) -> dict[str, float]:
        """Layer -> the share of its way to Z - U, 0..1, that the pull took it since the last ``restart``.

        It is empty where that is not known.
        """
        if not (self.known and self.steps):
            return {}
        return {name: -math.expm1(-way) for name, way in self._way.items()}

    def calm(self, before: Mapping[str, float]) -> None:
        """Keep the speed that momentum gives each weight, where its learning rate has risen since ``before``.

        SGD multiplies the sum of past gradients by the rate of now. A pull that was added at a lower rate, by a rho
        that was larger for it, would be multiplied as well.
        """
        if self.decoupled or not self.binding.is_sgd:
            return
        state = self.binding.owners[0].state
        for name, rate in self.rates().items():
            memory = state.get(self.binding.weights[name], {}).get("momentum_buffer")
            if memory is not None and rate > before.get(name, rate):
                memory.mul_(before[name] / rate)

    def restart(self) -> None:
        """Measure from here on."""
        self.steps, self._way = 0, dict.fromkeys(self._way, 0.0)

    def state_dict(self) -> State:
        """What was measured so far."""
        return {"way": dict(self._way), "steps": self.steps, "kept": self.kept}

    def load_state_dict(self, state: State) -> None:
        """Go on measuring from a state, which may be empty."""
        self._way |= {name: way for name, way in state.get("way", {}).items() if name in self._way}
        self.steps, self.kept = state.get("steps", 0), state.get("kept", 1.0)


def haste(pull: Pull, steps: float) -> str:
    """A warning that Z is updated before W could answer, or an empty text; ``steps`` lie between two Z-updates."""
    momentum = max(pull.size(name, 1).momentum for name in pull.binding.weights)
    memory = round(2 / (1 - momentum), 3)
    if not pull.binding.is_sgd or not steps < memory:
        return ""
    late = f"momentum {momentum:g} lets W answer over about {memory:.0f}: Z chases a W that is still on its way"
    remedy = f"Update less often: update_every={math.ceil(memory)}steps"
    return f"Z is updated every {steps:g} optimizer steps, but {late}. {remedy}"


def weakness(pull: Pull, *, asked: float | None, steps: float, rho: Mapping[str, float]) -> str:
    """What took most of the pull away since the last Z-update, with a remedy; an empty text where nothing did.

    Args:
        asked: the pull that was asked for; None where rho was given.
        steps: the optimizer steps that were expected.
        rho: of each layer.
    """
    measured = pull.measured()
    if not measured:
        return ""
    name = min(measured, key=lambda layer: measured[layer])
    weak = f"ADMM pulled {name} {measured[name]:.2f} of its way to Z"
    if pull.kept < 1 / 3 and not pull.decoupled:
        return (
            f"{weak}: clipping left {pull.kept:.2f} of the gradients. Use rho=auto, which moves the weights themselves"
        )
    if asked is not None and measured[name] < asked / 3:
        weak += f", where {asked:g} was asked for"
        if pull.steps < steps / 2:
            return f"{weak}: {pull.steps} optimizer steps were taken and {steps:g} expected; the next epochs go by this"
        return f"{weak}: its learning rate was too low for that. Raise it, or update less often"
    decay = float(pull.binding.group(name).get("weight_decay", 0.0))
    if pull.binding.is_sgd and decay > rho[name] > 0:
        return f"weight_decay={decay:g} draws {name} to 0 harder than rho={rho[name]:.2g} to Z: lower it, or raise rho"
    return ""


def _sample(grads: Iterable[Tensor]) -> Tensor:
    """A few numbers of each gradient, copied."""
    parts = [part_of(grad).flatten() for grad in grads]
    return torch.cat([part[:: max(1, -(-part.numel() // SAMPLE))].float() for part in parts])


def _left_of(before: Tensor, after: Tensor, summed: Callable[[Tensor], Tensor]) -> float:
    """The share of ``before`` that ``after`` still has, 0..1."""
    whole, left = summed(torch.stack([before.square().sum(), (before * after).sum()])).tolist()
    return min(1.0, max(0.0, left / whole)) if whole else 1.0


def _way(share: float) -> float:
    return -math.log1p(-share) if share < 1 else math.inf


def _tell(this: "weakref.ref[Pull]", owner: Optimizer) -> None:
    if (pull := this()) is not None:
        pull.stepped(owner)
