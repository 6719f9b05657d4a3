"""The Plan: which layer is factorized how, at which ranks and cost, and why each other layer stays dense."""

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hodec.errors import CheckpointError, HodecError, PlanError, near_matches
from hodec.files import read_json, write_json
from hodec.formats.base import Form
from hodec.formats.modes import Modes
from hodec.formats.runs import Runs
from hodec.kinds import KINDS
from hodec.methods import get_method

FORMAT, VERSION = "hodec-plan", 1


@dataclass(frozen=True)
class LayerPlan:
    """One layer's decision. Everything else (costs, execution) follows from these fields.

    Attributes:
        method: name in METHODS.
        kind: name in KINDS: ``conv2d``, ``linear``, ..
        shape: dense weight with output channels first, (O, I, K_1, ..) or (O, I).
        modes: how the channels split.
        ranks: in the format's order.
        runs: the layer's calls for one image, with the sizes of their input and output.
        execution: ``auto``, ``merged`` or ``chain``.
        aliases: other names under which the same module hangs in the net.
        notes: what the rule clipped or rounded.
    """

    method: str
    kind: str
    shape: tuple[int, ...]
    modes: Modes
    ranks: tuple[int, ...]
    runs: Runs
    execution: str = "auto"
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """The format's mathematics for this layer."""
        return get_method(self.method).form(self.kind)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight as the dense layer stores it."""
        out, inp, *kernel = self.shape
        return (inp, out, *kernel) if KINDS[self.kind].swapped else self.shape

    @property
    def runs_as(self) -> str:
        """The execution of inference, chosen by cost where ``execution`` is ``auto``."""
        if self.execution != "auto":
            return self.execution
        return self.form.choose_execution(self.shape, self.ranks, self.modes, runs=self.runs)

    @property
    def params_before(self) -> int:
        """Numbers in the dense weight; a bias stays as it is and is not counted here."""
        return math.prod(self.shape)

    @property
    def params_after(self) -> int:
        """Numbers in the factors."""
        return self.form.params(self.shape, self.ranks, self.modes)

    @property
    def macs_before(self) -> int:
        """Multiply-adds of the dense layer for one image."""
        if KINDS[self.kind].lookup:
            return 0
        positions = self.runs.before if KINDS[self.kind].transposed else self.runs.after
        return positions * math.prod(self.shape)

    @property
    def macs_after(self) -> int:
        """Multiply-adds of the factorized layer for one image, as it runs in inference."""
        return self.form.macs(self.shape, self.ranks, self.modes, runs=self.runs, execution=self.runs_as)

    def saves(self) -> bool:
        """Whether the factorized layer is nowhere costlier than the dense one, and somewhere cheaper."""
        params, macs = self.params_after - self.params_before, self.macs_after - self.macs_before
        if KINDS[self.kind].lookup:  # that costs nothing, so any factorized one costs more: memory decides
            return params < 0
        return params <= 0 and macs <= 0 and (params < 0 or macs < 0)

    def project(self, weight: Tensor) -> Tensor:
        """The (quasi-)nearest weight of these ranks, in dense form, stored as ``weight`` is."""
        kind = KINDS[self.kind]
        return kind.stored(self.form.project(kind.canonical(weight), self.ranks, self.modes))

    def check(self, name: str) -> "LayerPlan":
        """This layer plan, if its modes and ranks fit its shape.

        Raises:
            PlanError: naming the layer, what was given, what is allowed, and the override.
        """
        if self.kind not in get_method(self.method).layers:
            raise PlanError(f"{name}: method {self.method} has no layer for kind {self.kind!r}")
        allowed = ("auto", *self.form.executions)
        if self.execution not in allowed:
            raise PlanError(
                f"{name}: execution {self.execution!r} is not one of {', '.join(allowed)}; execution=auto always fits"
            )
        try:
            self.modes.check(self.shape[1], self.shape[0])
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
        try:
            self.form.check_ranks(self.shape, self.modes, self.ranks)
        except HodecError as error:
            raise PlanError(self._misfit(name, error)) from error
        return self

    def _misfit(self, name: str, error: HodecError) -> str:
        kernel = "x".join(map(str, self.shape[2:]))
        fit = self.form.fit_ranks(self.shape, self.modes, self.form.max_ranks(self.shape, self.modes))
        return (
            f"{name} ({self.kind} {self.shape[1]}->{self.shape[0]}{', ' + kernel if kernel else ''}, method "
            f"{self.method}, modes in={list(self.modes.inputs)} out={list(self.modes.outputs)}): {error}. "
            f"The override that mends it: 'tt_ranks={{{name}:{list(fit)}}}' with ranks up to these, or one "
            f"number, which is clipped to fit"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the costs are for the reader and recomputed on load."""
        return {
            "method": self.method,
            "kind": self.kind,
            "shape": list(self.shape),
            "modes": {"in": list(self.modes.inputs), "out": list(self.modes.outputs)},
            "ranks": list(self.ranks),
            "execution": self.execution,
            "runs_as": self.runs_as,
            "runs": [[times, list(before), list(after)] for times, before, after in self.runs.calls],
            "aliases": list(self.aliases),
            "notes": list(self.notes),
            "params_before": self.params_before,
            "params_after": self.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
        }

    @classmethod
    def from_dict(cls, name: str, value: Mapping[str, Any]) -> "LayerPlan":
        """Inverse of ``to_dict``, checked."""
        where = f"plan of layer {name}: "
        try:
            out, inp, *kernel = _wholes(value["shape"], where + "shape")
            layer = cls(
                method=_text(value["method"], where + "method"),
                kind=_text(value["kind"], where + "kind"),
                shape=(out, inp, *kernel),
                modes=Modes(tuple(value["modes"]["in"]), tuple(value["modes"]["out"])),
                ranks=tuple(value["ranks"]),
                runs=_runs(value["runs"], where + "runs"),
                execution=value.get("execution", "auto"),
                aliases=tuple(_text(alias, where + "aliases") for alias in value.get("aliases", ())),
                notes=tuple(_text(note, where + "notes") for note in value.get("notes", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"plan of layer {name}: field {error} is missing or of the wrong type") from error
        return layer.check(name)


@dataclass(frozen=True)
class Plan(Mapping[str, LayerPlan]):
    """Layer name -> LayerPlan, immutable; ``replace`` and ``without`` give changed copies.

    Attributes:
        layers: the layers to factorize.
        skipped: layer name -> why it stays dense.
        rule: what chose the ranks.
        dense_params, dense_macs: cost of the whole dense model (macs of one image).
        inputs: shape and type of each example input, for the dry run after conversion.
    """

    layers: Mapping[str, LayerPlan]
    skipped: Mapping[str, str]
    rule: str
    dense_params: int
    dense_macs: int
    inputs: tuple[tuple[tuple[int, ...], str], ...] = field(default=())

    def __getitem__(self, name: str) -> LayerPlan:
        if name not in self.layers:
            if name in self.skipped:
                raise KeyError(f"{name} is not in the plan: {self.skipped[name]}")
            raise KeyError(f"{name} is not in the plan.{near_matches(name, tuple(self.layers))}")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def params_before(self) -> int:
        """Parameters of the whole dense model."""
        return self.dense_params

    @property
    def macs_before(self) -> int:
        """Multiply-adds of the whole dense model for one image."""
        return self.dense_macs

    @property
    def params_after(self) -> int:
        """Parameters of the whole model after conversion."""
        return self.dense_params - sum(p.params_before - p.params_after for p in self.layers.values())

    @property
    def macs_after(self) -> int:
        """Multiply-adds of the whole model after conversion, for one image."""
        return self.dense_macs - sum(p.macs_before - p.macs_after for p in self.layers.values())

    @property
    def reduction(self) -> dict[str, float]:
        """Fractions cut from the whole model, 0..1."""
        pairs = {"params": (self.params_before, self.params_after), "macs": (self.macs_before, self.macs_after)}
        return {key: 1 - after / before if before else 0.0 for key, (before, after) in pairs.items()}

    def replace(
        self,
        name: str,
        *,
        ranks: Sequence[int] | None = None,
        modes: Modes | None = None,
        execution: str | None = None,
        method: str | None = None,
    ) -> "Plan":
        """A copy in which one layer is planned differently; checked like any other."""
        given = {"ranks": ranks, "modes": modes, "execution": execution, "method": method}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if "ranks" in changes:
            changes["ranks"] = tuple(changes["ranks"])
        layer = dataclasses.replace(self[name], **changes, notes=(*self[name].notes, "edited by hand"))
        return dataclasses.replace(self, layers={**self.layers, name: layer.check(name)})

    def without(self, name: str, reason: str = "left dense by hand") -> "Plan":
        """A copy in which one layer stays dense."""
        self[name]
        layers = {key: value for key, value in self.layers.items() if key != name}
        return dataclasses.replace(self, layers=layers, skipped={**self.skipped, name: reason})

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Inputs like those the plan was made with: seeded noise, or zeros where they are integers; batch 2."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for shape, kind in self.inputs:
            dtype, size = getattr(torch, kind), (2, *shape[1:])
            noise = torch.randn(size, generator=generator) if dtype.is_floating_point else torch.zeros(size)
            made.append(noise.to(dtype))
        return tuple(made)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "rule": self.rule,
            "inputs": [{"shape": list(shape), "dtype": kind} for shape, kind in self.inputs],
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "skipped": dict(self.skipped),
            "totals": {
                "params_before": self.params_before,
                "params_after": self.params_after,
                "macs_before": self.macs_before,
                "macs_after": self.macs_after,
            },
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Plan":
        """Inverse of ``to_dict``; every layer is checked, costs are recomputed."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise PlanError(f'this is not a hodec plan: it lacks \'"format": "{FORMAT}"\'')
        if value.get("version") != VERSION:
            raise PlanError(f"plan version {value.get('version')!r} is not {VERSION}, which this hodec reads")
        try:
            totals, layers, skipped = value["totals"], value["layers"], value["skipped"]
            dense_params, dense_macs = _wholes(
                (totals["params_before"], totals["macs_before"]), "the plan's totals", least=0
            )
            inputs = tuple((_wholes(i["shape"], "the plan's inputs"), _dtype_name(i["dtype"])) for i in value["inputs"])
            return cls(
                layers={name: LayerPlan.from_dict(name, layer) for name, layer in layers.items()},
                skipped={name: _text(reason, f"reason of {name}") for name, reason in skipped.items()},
                rule=_text(value["rule"], "the plan's rule"),
                dense_params=dense_params,
                dense_macs=dense_macs,
                inputs=inputs,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the plan lacks a field or has one of the wrong type: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan, possibly edited by hand.

        Raises:
            PlanError: unreadable, not a plan, or ranks that do not fit; the message names the layer.
        """
        try:
            return cls.from_dict(read_json(Path(path), "plan"))
        except CheckpointError as error:
            raise PlanError(str(error)) from error

    def __str__(self) -> str:
        from rich.console import Console

        from hodec.plan_table import plan_table

        text = io.StringIO()
        Console(file=text, width=150, color_system=None).print(plan_table(self))
        return text.getvalue()


def _wholes(values: Sequence[Any], what: str, least: int = 1) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not all(type(n) is int and n >= least for n in values):
        raise PlanError(f"{what}: {values!r} is not a list of whole numbers of at least {least}")
    return tuple(values)


def _runs(value: Any, what: str) -> Runs:
    if not isinstance(value, list) or not all(isinstance(call, list) and len(call) == 3 for call in value):
        raise PlanError(f"{what}: {value!r} is not a list of [times, input size, output size]")
    return Runs(
        tuple(
            (_wholes([times], what)[0], _wholes(before, what, least=0), _wholes(after, what, least=0))
            for times, before, after in value
        )
    )


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{what}: {value!r} is not a text")
    return value


def _dtype_name(value: Any) -> str:
    if not isinstance(getattr(torch, _text(value, "type of the plan's inputs"), None), torch.dtype):
        raise PlanError(f"type of the plan's inputs: {value!r} is none of torch's, such as float32 or int64")
    return str(value)
