"""LayerPlan: how one layer is factorized, at which ranks and cost."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hodec.errors import HodecError, PlanError, Use, literal
from hodec.formats.base import Format
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.formats.ops import dense_op
from hodec.formats.roles import REBUILT, STEP_MACS, Role
from hodec.io.atomic import JsonObject
from hodec.layers.weight import holder_name
from hodec.methods import get_method

# How plans of version 1 (hodec 0.1.0) call what this version writes under another key.
KEYS_OF_VERSION_1 = {"kind": "layer_type", "runs": "call_sites", "runs_as": "resolved_execution"}

# What every reader of JSON takes for a whole number: up to 2^53 a float64 holds each. Products of a few of them are
# still finite as floats.
MOST_WHOLE = 2**53


@dataclass(frozen=True)
class Tie:
    """A further layer that has the same weight as a planned one, such as the embedding of a language model's head.

    Attributes:
        name: of the layer.
        layer_type: name in LAYER_TYPES: that of the planned layer, or ``embedding`` beside a ``linear`` one.
        call_sites: its own calls for one image; none where it is not called.
        aliases: other names under which the same module hangs in the net.
    """

    name: str
    layer_type: str
    call_sites: CallSites
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """One layer's decision. Everything else (costs, execution) follows from these fields.

    Attributes:
        method: name in METHODS.
        layer_type: name in LAYER_TYPES: ``conv2d``, ``linear``, ..
        shape: dense weight with output channels first, (O, I, K_1, ..) or (O, I).
        modes: how the channels split.
        ranks: in the format's order.
        call_sites: the layer's calls for one image, with the sizes of their input and output.
        execution: ``auto``, ``merged`` or ``chain``.
        aliases: other names under which the same module hangs in the net.
        notes: what the rule clipped or rounded.
        role: what uses the weight: a layer of its own, which is swapped, or a module with several weights.
        groups: of a grouped convolution, each of which is factorized on its own.
        computed_from: numbers in the parameters that the dense layer computes its weight from (``weight_norm``,
            standardized convolutions), all of which the factors replace; 0 where the weight is a parameter.
        ties: further layers with the same weight: all of them get the same factors, and their costs are counted here.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> layer = plan["0"]
        >>> layer.method, layer.shape, layer.ranks, layer.macs_before, layer.macs_after
        ('svd', (64, 64), (4,), 4096, 512)
    """

    method: str
    layer_type: str
    shape: tuple[int, ...]
    modes: Modes
    ranks: tuple[int, ...]
    call_sites: CallSites
    execution: str = "auto"
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    role: Role = Role.LAYER
    groups: int = 1
    computed_from: int = 0
    ties: tuple[Tie, ...] = ()

    @cached_property
    def users(self) -> tuple["LayerPlan", ...]:
        """This layer and those tied to it, each as if the weight were its own."""
        return (dataclasses.replace(self, ties=()), *map(self._as_tied, self.ties)) if self.ties else (self,)

    def _as_tied(self, tie: Tie) -> "LayerPlan":
        own = dataclasses.replace(
            self, layer_type=tie.layer_type, call_sites=tie.call_sites, aliases=tie.aliases, ties=()
        )
        if tie.layer_type == self.layer_type:
            return own
        out, inp = self.shape  # the rows of a linear layer are what an embedding looks up
        turned = Modes(self.modes.outputs, self.modes.inputs)
        return dataclasses.replace(own, shape=(inp, out), modes=turned, execution="auto")

    def names(self, name: str) -> dict[str, tuple[str, ...]]:
        """The layers of the plan's entry ``name``: this one and those tied to it, each with all its names."""
        return {name: (name, *self.aliases), **{tie.name: (tie.name, *tie.aliases) for tie in self.ties}}

    def parameter(self, name: str) -> str:
        """The path of the dense weight of the plan's entry ``name``: a layer's is its ``weight``."""
        return f"{name}.weight" if self.role is Role.LAYER else name

    def module(self, name: str) -> str:
        """The name of the factorized layer of the plan's entry ``name`` in a converted model."""
        return name if self.role is Role.LAYER else holder_name(name)

    @property
    def executions(self) -> tuple[str, ...]:
        """The executions that its user can run it by."""
        if self.role is Role.PARAMETER:
            return (REBUILT,)
        return self.format.executions if self.role is Role.LAYER else (REBUILT, *self.format.executions)

    def __repr__(self) -> str:
        macs = f"{self.macs_before:,} -> {self.macs_after:,} MACs"
        params = f"{self.params_before:,} -> {self.params_after:,} parameters"
        return f"LayerPlan({self.method} of {self.layer_type} {self.shape}, ranks {list(self.ranks)}: {params}, {macs})"

    @property
    def format(self) -> Format:
        """The format's mathematics for this layer."""
        return get_method(self.method).format(self.layer_type, self.groups)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight as the dense layer stores it."""
        return LAYER_TYPES[self.layer_type].stored_shape(self.shape)

    @property
    def resolved_execution(self) -> str:
        """The execution of inference, chosen by cost where ``execution`` is ``auto``.

        A weight inside a module is rebuilt where its factors would save no multiply-adds, or too few in each step.
        """
        if self.role is Role.PARAMETER or self.execution == REBUILT:
            return REBUILT
        chosen = self.execution
        if chosen == "auto":
            chosen = self.format.choose_execution(self.shape, self.ranks, self.modes, call_sites=self.call_sites)
        if self.role is Role.LAYER:
            return chosen
        ops = self.format.ops(self.shape, self.ranks, self.modes, execution=chosen)
        saved = math.prod(self.shape) - sum(op.work for op in ops)
        least = STEP_MACS if self.role is Role.RECURRENT else 0
        by_itself = self.execution == "auto" and saved <= least
        return REBUILT if by_itself or ops == [dense_op(self.shape)] else chosen

    @property
    def params_before(self) -> int:
        """Numbers in the dense weight, or in what computes it; a bias stays as it is and is not counted here."""
        return self.computed_from or math.prod(self.shape)

    @property
    def params_after(self) -> int:
        """Numbers in the factors."""
        return self.format.params(self.shape, self.ranks, self.modes)

    @property
    def macs_before(self) -> int:
        """Multiply-adds of the dense layer, and of those tied to it, for one image."""
        if self.ties:
            return sum(user.macs_before for user in self.users)
        if LAYER_TYPES[self.layer_type].is_embedding:
            return 0
        sites, layer_type = self.call_sites, LAYER_TYPES[self.layer_type]
        work = math.prod(self.shape[:2] if layer_type.stacked else self.shape)  # each position is one expert's
        return (sites.in_positions if layer_type.transposed else sites.out_positions) * work

    @property
    def macs_after(self) -> int:
        """Multiply-adds of the factorized layer, and of those tied to it, for one image, as it runs in inference."""
        if self.ties:
            return sum(user.macs_after for user in self.users)
        if self.resolved_execution == REBUILT:
            return self.macs_before
        return self.format.macs(
            self.shape, self.ranks, self.modes, call_sites=self.call_sites, execution=self.resolved_execution
        )

    def saves(self) -> bool:
        """Whether the factorized layer is nowhere costlier than the dense one, and somewhere cheaper."""
        params = self.params_after - self.params_before
        # an embedding has no MACs, any factorized one has some: memory decides
        counted = [user for user in self.users if not LAYER_TYPES[user.layer_type].is_embedding]
        if not counted:
            return params < 0
        macs = sum(user.macs_after - user.macs_before for user in counted)
        return params <= 0 and macs <= 0 and (params < 0 or macs < 0)

    def project(self, weight: Tensor) -> Tensor:
        """The (quasi-)nearest weight of these ranks, in dense form, stored as ``weight`` is."""
        layer_type = LAYER_TYPES[self.layer_type]
        return layer_type.from_oihw(self.format.project(layer_type.to_oihw(weight), self.ranks, self.modes))

    def check(self, name: str) -> "LayerPlan":
        """This layer plan, if its modes and ranks fit its shape.

        Raises:
            PlanError: naming the layer, what was given, and what is allowed.
        """
        if not get_method(self.method).serves(self.layer_type, self.groups):
            grouped = f" in {self.groups} groups" * (self.groups > 1)
            raise PlanError(f"{name}: method {self.method} has no layer for layer type {self.layer_type!r}{grouped}")
        for tie in self.ties:
            if get_method(self.method).tied_layer(self.layer_type, tie.layer_type, self.groups) is None:
                kinds = f"of type {tie.layer_type!r} to one of type {self.layer_type!r}"
                raise PlanError(f"{name}: method {self.method} cannot tie the layer {tie.name} {kinds}")
        layer_type = LAYER_TYPES[self.layer_type]
        if len(self.shape) != 2 + layer_type.dims + layer_type.stacked:
            raise PlanError(
                f"{name}: shape {list(self.shape)} is not that of a {self.layer_type} weight, which has "
                f"{2 + layer_type.dims + layer_type.stacked} axes"
            )
        if self.shape[0] % self.groups:
            raise PlanError(f"{name}: {self.shape[0]} output channels do not split into {self.groups} groups")
        axes = layer_type.dims
        if axes and any(len(size) != axes for _, *sizes in self.call_sites.calls for size in sizes):
            raise PlanError(
                f"{name}: call_sites have input and output sizes of other than the {axes} axes of its kernel"
            )
        allowed = ("auto", *self.executions)
        if self.execution not in allowed:
            raise PlanError(
                f"{name}: execution {self.execution!r} is not one of {', '.join(allowed)}; execution=auto always fits"
            )
        self._check_modes(name)
        try:
            self.format.check_ranks(self.shape, self.modes, self.ranks)
        except HodecError as error:
            raise self._misfit(name, error) from error
        return self

    def _check_modes(self, name: str) -> None:
        try:
            self.modes.check(self.shape[1], self.shape[0])
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
        if self.modes != (allowed := self.modes_for(self.method)) and not self.format.uses_modes:
            raise PlanError(
                f"{name}: modes in={list(self.modes.inputs)} out={list(self.modes.outputs)} given; allowed: "
                f"in={list(allowed.inputs)} out={list(allowed.outputs)}, for method {self.method} splits no channels"
            )

    def modes_for(self, method: str) -> Modes:
        """The modes that the layer has under another method: its own where that can have as many, else an even split.

        Raises:
            PlanError: no such method.
        """
        other, count = get_method(method), len(self.modes.inputs)
        if not other.serves(self.layer_type, self.groups):
            return self.modes
        fmt = other.format(self.layer_type, self.groups)
        allowed = max(count, fmt.min_modes) if fmt.uses_modes else 1
        return self.modes if count == allowed else Modes.split(self.shape[1], self.shape[0], allowed)

    def _misfit(self, name: str, error: HodecError) -> PlanError:
        kernel, inp = "x".join(map(str, self.shape[2:])), self.shape[1] * self.groups
        fit = self.format.fit_ranks(self.shape, self.modes, self.format.max_ranks(self.shape, self.modes))
        about = (
            f"{name} ({self.layer_type} {inp}->{self.shape[0]}{', ' + kernel if kernel else ''}, "
            f"method {self.method}, modes in={list(self.modes.inputs)} out={list(self.modes.outputs)})"
        )
        return PlanError(
            f"{literal(f'{about}: {error}')}. Ranks up to {{ranks}} fit, and one number for all is clipped to fit",
            ranks=Use("tt_ranks", f"{{{name}:{list(fit)}}}"),
        )

    def to_dict(self) -> JsonObject:
        """Plain JSON values; the costs are for the reader and recomputed on load."""
        return {
            "method": self.method,
            "layer_type": self.layer_type,
            "shape": list(self.shape),
            "modes": {"in": list(self.modes.inputs), "out": list(self.modes.outputs)},
            "ranks": list(self.ranks),
            "execution": self.execution,
            "resolved_execution": self.resolved_execution,
            "call_sites": _calls(self.call_sites),
            "aliases": list(self.aliases),
            "notes": list(self.notes),
            "params_before": self.params_before,
            "params_after": self.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            **({} if self.role is Role.LAYER else {"role": self.role.value}),
            **({"groups": self.groups} if self.groups > 1 else {}),
            **({"computed_from": self.computed_from} if self.computed_from else {}),
            **({"ties": [_tie_to_dict(tie) for tie in self.ties]} if self.ties else {}),
        }

    @classmethod
    def from_dict(cls, name: str, value: JsonObject) -> "LayerPlan":
        """Inverse of ``to_dict``, checked."""
        where = f"plan of layer {name}: "
        try:
            value = {KEYS_OF_VERSION_1.get(key, key): one for key, one in value.items()}
            out, inp, *kernel = read_wholes(value["shape"], where + "shape")
            layer = cls(
                method=read_text(value["method"], where + "method"),
                layer_type=read_text(value["layer_type"], where + "layer_type"),
                shape=(out, inp, *kernel),
                modes=Modes(tuple(value["modes"]["in"]), tuple(value["modes"]["out"])),
                ranks=tuple(value["ranks"]),
                call_sites=read_call_sites(value["call_sites"], where + "call_sites"),
                execution=value.get("execution", "auto"),
                aliases=tuple(read_text(alias, where + "aliases") for alias in value.get("aliases", ())),
                notes=tuple(read_text(note, where + "notes") for note in value.get("notes", ())),
                role=Role(value.get("role", Role.LAYER)),
                groups=read_wholes([value.get("groups", 1)], where + "groups")[0],
                computed_from=read_wholes([value.get("computed_from", 0)], where + "computed_from", least=0)[0],
                ties=tuple(_read_tie(one, where) for one in value.get("ties", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"plan of layer {name}: field {error} is missing or of the wrong type") from error
        return layer.check(name)


def _calls(sites: CallSites) -> list[list[object]]:
    return [[times, list(before), list(after)] for times, before, after in sites.calls]


def _tie_to_dict(tie: Tie) -> JsonObject:
    return {
        "name": tie.name,
        "layer_type": tie.layer_type,
        "call_sites": _calls(tie.call_sites),
        "aliases": list(tie.aliases),
    }


def _read_tie(value: JsonObject, where: str) -> Tie:
    """Inverse of ``_tie_to_dict``."""
    name, layer_type = (read_text(value[key], f"{where}ties") for key in ("name", "layer_type"))
    aliases = tuple(read_text(alias, f"{where}ties") for alias in value["aliases"])
    return Tie(name, layer_type, read_call_sites(value["call_sites"], f"{where}ties"), aliases)


def read_wholes(values: object, what: str, least: int = 1) -> tuple[int, ...]:
    """A list of whole numbers from a file; refused as ``what`` unless each is from ``least`` to MOST_WHOLE."""
    if not isinstance(values, Sequence) or not all(type(n) is int and least <= n <= MOST_WHOLE for n in values):
        raise PlanError(f"{what}: {values!r} is not a list of whole numbers of at least {least} and at most 2^53")
    return tuple(values)


def read_call_sites(value: object, what: str) -> CallSites:
    """Calls of a layer from a file, [times, input size, output size] each; refused as ``what``."""
    if not isinstance(value, list) or not all(isinstance(call, list) and len(call) == 3 for call in value):
        raise PlanError(f"{what}: {value!r} is not a list of [times, input size, output size]")
    calls = tuple(
        (read_wholes([times], what)[0], read_wholes(before, what, least=0), read_wholes(after, what, least=0))
        for times, before, after in value
    )
    if any(len(before) != len(after) for _, before, after in calls):
        raise PlanError(f"{what}: {value!r} has an input size and an output size of different lengths")
    return CallSites(calls)


def read_text(value: object, what: str) -> str:
    """A text from a file; refused as ``what``."""
    if not isinstance(value, str):
        raise PlanError(f"{what}: {value!r} is not a text")
    return value
