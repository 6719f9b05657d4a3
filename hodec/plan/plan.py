"""The Plan: which layer is factorized how, at which ranks and cost, and why each other layer stays dense."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hodec.errors import CheckpointError, PlanError, listed, near_matches
from hodec.formats.modes import Modes
from hodec.inputs import ModelInput, Sizes, from_form
from hodec.io.atomic import JsonObject, read_json, write_json, writing
from hodec.plan.layer import MOST_WHOLE, LayerPlan, read_text, read_wholes
from hodec.text_table import change, human, rendered, rendered_html

FORMAT, VERSION, READABLE = "hodec-plan", 3, (1, 2, 3)


# Numbers in the example inputs that a plan's file may ask for: 1 GiB of float32, a volume of 645 voxels a side.
MOST_INPUT = 2**28

MAPPINGS = ("layers", "skipped", "skipped_costs", "other")


@dataclass(frozen=True)
class Plan(Mapping[str, LayerPlan]):
    """Layer name -> LayerPlan, immutable; ``replace`` and ``without`` give changed copies.

    Attributes:
        layers: the layers to factorize.
        skipped: layer name -> why it stays dense.
        rule: what chose the ranks.
        dense_params, dense_macs: cost of the whole dense model (macs of one image).
        inputs: shape and type of each example input, for the dry run after conversion.
        input_form: how these hang together, see ``hodec.inputs.form_of``; None: the arguments in order, batch first.
        skipped_costs: skipped layer -> its parameters, and its multiply-adds for one image where they are known.
        other: parameters of all that is neither planned nor skipped, by kind: norms, biases, tables.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> list(plan), plan["0"].ranks
        (['0', '2'], (4,))
        >>> plan.replace("0", ranks=[3])["0"].ranks, plan.without("2").skipped["2"]
        ((3,), 'left dense by hand')
        >>> plan.save("plan.json")  # an editor may change it
        >>> hodec.Plan.load("plan.json") == plan
        True
    """

    layers: Mapping[str, LayerPlan]
    skipped: Mapping[str, str]
    rule: str
    dense_params: int
    dense_macs: int
    inputs: Sizes = field(default=())
    input_form: object = None
    skipped_costs: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    other: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in MAPPINGS:
            object.__setattr__(self, key, MappingProxyType(dict(getattr(self, key))))

    def __reduce__(self) -> tuple[type["Plan"], tuple[object, ...]]:
        """A plan is copied and pickled by its arguments, for read-only mappings cannot be."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return type(self), tuple(dict(value) if key in MAPPINGS else value for key, value in values.items())

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

    @property
    def coverage(self) -> dict[str, float]:
        """Shares of the whole dense model that stand in the layers to factorize, 0..1."""
        pairs = {"params": (self.params_before, "params_before"), "macs": (self.macs_before, "macs_before")}
        return {key: sum(getattr(p, of) for p in self.values()) / (whole or 1) for key, (whole, of) in pairs.items()}

    def replace(
        self,
        name: str,
        *,
        ranks: Sequence[int] | None = None,
        modes: Modes | None = None,
        execution: str | None = None,
        method: str | None = None,
    ) -> "Plan":
        """A copy in which one layer is planned differently; checked like any other.

        Without ``modes`` the layer keeps its own, or gets an even split where ``method`` cannot have as many.
        """
        old = self[name]
        layer = dataclasses.replace(
            old,
            ranks=old.ranks if ranks is None else tuple(ranks),
            modes=old.modes_for(old.method if method is None else method) if modes is None else modes,
            execution=old.execution if execution is None else execution,
            method=old.method if method is None else method,
            notes=(*old.notes, "edited by hand"),
        )
        return dataclasses.replace(self, layers={**self.layers, name: layer.check(name)})

    def without(self, name: str, reason: str = "left dense by hand") -> "Plan":
        """A copy in which one layer stays dense."""
        costs = {**self.skipped_costs, name: (self[name].params_before, self[name].macs_before)}
        layers = {key: value for key, value in self.layers.items() if key != name}
        skipped = {**self.skipped, name: reason}
        return dataclasses.replace(self, layers=layers, skipped=skipped, skipped_costs=costs)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Inputs like those the plan was made with: seeded noise, or zeros where they are integers; batch 2."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for size, kind in self._sizes_of_two():
            dtype = getattr(torch, kind)
            noise = torch.randn(size, generator=generator) if dtype.is_floating_point else torch.zeros(size)
            made.append(noise.to(dtype))
        return tuple(made)

    def _sizes_of_two(self) -> Sizes:
        if self.input_form is None:
            return tuple(((2, *shape[1:]), kind) for shape, kind in self.inputs)
        return from_form(self.input_form, _without_numbers(self.inputs)).with_batch(2).sizes

    def example_input(self) -> ModelInput:
        """``example_inputs`` as the arguments of the model; with a form, tensors without the batch keep their sizes."""
        return from_form(self.input_form, self.example_inputs())

    def to_dict(self) -> JsonObject:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "rule": self.rule,
            "inputs": [{"shape": list(shape), "dtype": kind} for shape, kind in self.inputs],
            "input_form": self.input_form,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "skipped": dict(self.skipped),
            "skipped_costs": {name: list(cost) for name, cost in self.skipped_costs.items()},
            "other": dict(self.other),
            "totals": {
                "params_before": self.params_before,
                "params_after": self.params_after,
                "macs_before": self.macs_before,
                "macs_after": self.macs_after,
            },
        }

    @classmethod
    def from_dict(cls, value: JsonObject) -> "Plan":
        """Inverse of ``to_dict``; every layer is checked, costs are recomputed."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise PlanError(f'this is not a hodec plan: it lacks \'"format": "{FORMAT}"\'')
        if value.get("version") not in READABLE:
            raise PlanError(f"plan version {value.get('version')!r} is not one of {READABLE}, which this hodec reads")
        try:
            totals, layers, skipped = value["totals"], value["layers"], value["skipped"]
            dense_params, dense_macs = read_wholes(
                (totals["params_before"], totals["macs_before"]), "the plan's totals", least=0
            )
            other = value.get("other", {})
            inputs = _inputs(value["inputs"])
            return cls(
                layers={name: LayerPlan.from_dict(name, layer) for name, layer in layers.items()},
                skipped={name: read_text(reason, f"reason of {name}") for name, reason in skipped.items()},
                rule=read_text(value["rule"], "the plan's rule"),
                dense_params=dense_params,
                dense_macs=dense_macs,
                inputs=inputs,
                input_form=_form(value.get("input_form"), inputs),
                skipped_costs={name: _cost(name, cost) for name, cost in value.get("skipped_costs", {}).items()},
                other=dict(zip(other, read_wholes(tuple(other.values()), "the plan's other parameters"), strict=True)),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"the plan lacks a field or has one of the wrong type: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            PlanError: it cannot be written there.
        """
        with writing(Path(path), PlanError):
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
        return rendered(plan_table(self))

    def __repr__(self) -> str:
        cut = ", ".join(f"{key} {change(share)}" for key, share in self.reduction.items())
        return f"Plan(rule {self.rule}: {len(self)} layers factorized, {len(self.skipped)} left dense; {cut})"

    def _repr_html_(self) -> str:
        """The printed plan, for notebooks."""
        return rendered_html(plan_table(self))


def check_plan(given: object) -> None:
    """Refuse what is no plan, such as the name of its file.

    Raises:
        PlanError: saying what was given.
    """
    if not isinstance(given, Plan):
        raise PlanError(f"plan: a {type(given).__name__} given; allowed: a Plan; Plan.load(path) reads one from a file")


def _cost(name: str, value: object) -> tuple[int, int | None]:
    """Parameters and multiply-adds of a skipped layer from a file, the latter null where they are not known."""
    what = f"parameters and multiply-adds of {name}"
    if not isinstance(value, list) or len(value) != len(("params", "macs")):
        raise PlanError(f"{what}: {value!r} is no list of both")
    params, macs = value
    return read_wholes((params,), what, least=0)[0], macs if macs is None else read_wholes((macs,), what, least=0)[0]


def _inputs(value: Sequence[Mapping[str, object]]) -> Sizes:
    """Shapes and types of a file's inputs, which the dry run after conversion makes two of."""
    inputs = tuple((read_wholes(one["shape"], "the plan's inputs"), _dtype_name(one["dtype"])) for one in value)
    numbers = sum(math.prod(shape) for shape, _ in inputs)
    if numbers > MOST_INPUT:
        held = f"{numbers:,}" if numbers < MOST_WHOLE else "more than 2^53"
        raise PlanError(
            f"the plan's inputs: {', '.join(str(list(shape)) for shape, _ in inputs)} hold {held} numbers; a file "
            f"may ask for {MOST_INPUT:,}. Make the plan with smaller example inputs, which may be of batch 1"
        )
    return inputs


def _form(value: object, inputs: Sizes) -> object:
    """The form of a file's inputs, tried on tensors without numbers."""
    value = _in_order(value)[1]
    if [x.shape for x in from_form(value, _without_numbers(inputs)).tensors] != [shape for shape, _ in inputs]:
        raise PlanError(f"form of the plan's inputs: {value!r} does not hold each of its {len(inputs)} inputs once")
    return value


def _in_order(value: object) -> tuple[float, object]:
    """The number of its first tensor, and the value with keys in the order of their tensors: some writers sort them."""
    if isinstance(value, dict):
        if type(value.get("tensor")) is int:
            return value["tensor"], value
        found = sorted(((key, *_in_order(one)) for key, one in value.items()), key=lambda item: item[1])
        return min((first for _, first, _ in found), default=math.inf), {key: one for key, _, one in found}
    if isinstance(value, list):
        each = [_in_order(one) for one in value]
        return min((first for first, _ in each), default=math.inf), [one for _, one in each]
    return math.inf, value


def _without_numbers(inputs: Sizes) -> list[Tensor]:
    return [torch.empty(shape, dtype=getattr(torch, kind), device="meta") for shape, kind in inputs]


def _dtype_name(value: object) -> str:
    dtype = getattr(torch, read_text(value, "type of the plan's inputs"), None)
    if not isinstance(dtype, torch.dtype) or not _takes_numbers(dtype):
        raise PlanError(f"type of the plan's inputs: {value!r} is none of torch's, such as float32 or int64")
    return str(value)


def _takes_numbers(dtype: torch.dtype) -> bool:
    """Whether tensors of this type can be made from others: those of quantized numbers and of single bits cannot."""
    try:
        torch.zeros(1).to(dtype)
    except RuntimeError:
        return False
    return True


def plan_table(plan: Plan) -> Group:
    """A rich renderable of the whole plan."""
    table = Table(title=f"Plan by rule {plan.rule}: {len(plan)} layers factorized, {len(plan.skipped)} left dense")
    for heading in ("layer", "weight", "method", "modes in x out", "ranks", "execution"):
        table.add_column(heading, overflow="fold")
    for heading in ("params", "->", "MACs", "->"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, layer in plan.items():
        table.add_row(name, *_cells(layer))
    table.add_section()
    numbers = (plan.params_before, plan.params_after, plan.macs_before, plan.macs_after)
    table.add_row("whole model", "", "", "", "", "", *(human(n) for n in numbers))
    cut = plan.reduction
    lines = [f"reduction: {cut['params']:.1%} of the parameters, {cut['macs']:.1%} of the MACs (1 MAC = 2 FLOPs)"]
    lines += [f"note: {text}: {listed(names, 3)}" for text, names in _notes(plan).items()]
    lines += [f"dense: {name}: {reason}{_share(plan, name)}" for name, reason in plan.skipped.items()]
    if plan.other:
        kinds = ", ".join(f"{kind} {human(count)}" for kind, count in plan.other.items())
        lines.append(f"other: {sum(plan.other.values()) / (plan.dense_params or 1):.1%} of the parameters ({kinds})")
    cover = plan.coverage
    lines.append(f"covered: {cover['params']:.1%} of the parameters and {cover['macs']:.1%} of the MACs are planned")
    return Group(table, Text("\n".join(lines)))


def _notes(plan: Plan) -> dict[str, list[str]]:
    """Note -> the layers that have it."""
    found: dict[str, list[str]] = {}
    for name, layer in plan.items():
        for note in layer.notes:
            found.setdefault(note, []).append(name)
    return found


def _share(plan: Plan, name: str) -> str:
    """What a skipped layer holds of the whole model, in words; empty where that is not known."""
    params, macs = plan.skipped_costs.get(name, (0, None))
    parts = [f"{params / (plan.dense_params or 1):.1%} of the parameters"] if params else []
    parts += [f"{macs / (plan.dense_macs or 1):.1%} of the MACs"] if macs else []
    return f" ({', '.join(parts)})" if parts else ""


def _cells(layer: LayerPlan) -> list[str]:
    modes = f"{_times(layer.modes.inputs)} x {_times(layer.modes.outputs)}"
    numbers = (layer.params_before, layer.params_after, layer.macs_before, layer.macs_after)
    ranks = ", ".join(map(str, layer.ranks))
    return [_times(layer.shape), layer.method, modes, ranks, layer.resolved_execution, *(human(n) for n in numbers)]


def _times(numbers: tuple[int, ...]) -> str:
    return "·".join(map(str, numbers))
