"""The plan as a person reads it: one row a layer, costs before and after, and why the others stay dense."""

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hodec.plan import LayerPlan, Plan


def plan_table(plan: "Plan") -> Group:
    """A rich renderable of the whole plan."""
    table = Table(title=f"Plan by rule {plan.rule}: {len(plan)} layers factorized, {len(plan.skipped)} left dense")
    for heading in ("layer", "weight", "method", "modes in x out", "ranks", "runs as"):
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
    lines += [f"dense: {name}: {reason}" for name, reason in plan.skipped.items()]
    return Group(table, Text("\n".join(lines)))


def _cells(layer: "LayerPlan") -> list[str]:
    modes = f"{_times(layer.modes.inputs)} x {_times(layer.modes.outputs)}"
    numbers = (layer.params_before, layer.params_after, layer.macs_before, layer.macs_after)
    ranks = ", ".join(map(str, layer.ranks))
    return [_times(layer.shape), layer.method, modes, ranks, layer.runs_as, *(human(n) for n in numbers)]


def _times(numbers: tuple[int, ...]) -> str:
    return "·".join(map(str, numbers))


def human(n: float) -> str:
    """1234567 -> '1.23 M'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.3g} {unit}" if abs(n) < 999.5 * limit else f"{n / limit:.0f} {unit}"
    return f"{n:.0f}"
