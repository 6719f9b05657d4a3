"""The tables of a report, as text cells: HTML and Markdown show the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from hodec.experiment.report import units
from hodec.experiment.report.rundata import NETWORKS, PHASES, Layer, Network, RunData, cut
from hodec.experiment.report.words import best_run, progress

FP32_BYTES = 4
_COSTS = ("params", "macs")


@dataclass(frozen=True)
class Cell:
    """One cell: ``detail`` is shown on hovering, ``link`` is a relative address, ``bar`` a share of 1 to draw."""

    text: str
    detail: str = ""
    link: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """Cells in column order, a note below them, and whether the row stands out."""

    cells: tuple[Cell, ...]
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Columns are (title, holds numbers); columns of numbers are right-aligned."""

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[Row, ...]
    foot: tuple[Row, ...] = ()

    def without_empty_columns(self, *titles: str) -> "Table":
        """The table without those of the named columns that have a value in no row."""
        rows = self.rows + self.foot
        keep = [
            at
            for at, (title, _) in enumerate(self.columns)
            if title not in titles or any(row.cells[at].text not in ("", units.ABSENT) for row in rows)
        ]

        def kept(row: Row) -> Row:
            return Row(tuple(row.cells[at] for at in keep), note=row.note, strong=row.strong)

        columns = tuple(self.columns[at] for at in keep)
        return Table(columns, tuple(map(kept, self.rows)), tuple(map(kept, self.foot)))


def _counted(value: float | None) -> Cell:
    return Cell(units.count(value), detail=units.exact(value))


def _changed(before: float | None, after: float | None, *, bar: bool = False) -> Cell:
    fraction = cut(before, after)
    return Cell(units.change(fraction), bar=fraction if bar else None)


def results(run: RunData) -> Table:
    """Dense, truncated and compressed network side by side; changes are against the most accurate dense one."""
    dense = run.network(run.reference)
    rows: list[Row] = []
    for name, meaning in NETWORKS.items():
        network = run.network(name)
        if name in ("teacher", "pretrained") and name not in run.outcome.networks:
            continue
        if network.accuracy_raw is not None:
            raw = Network(network.accuracy_raw, params=network.params, macs=network.macs)
            rows.append(_result(f"{name}, raw", "the same before BatchNorm statistics were re-estimated", raw, dense))
        beside = None if name == run.reference else dense
        rows.append(_result(name, meaning, network, beside, strong=name == "compressed"))
    columns = (
        ("network", False), ("", False), ("test accuracy", True), ("points", True), ("parameters", True),
        ("change", True), ("size fp32", True), ("MACs", True), ("change ", True), ("latency", True),
    )  # fmt: skip
    return Table(columns, tuple(rows)).without_empty_columns("latency")


def _result(name: str, meaning: str, network: Network, dense: Network | None, *, strong: bool = False) -> Row:
    """``dense`` is the network to compare with; None for that one itself."""
    beside = dense or Network()
    known = network.accuracy is not None and beside.accuracy is not None
    difference = network.accuracy - beside.accuracy if known else None  # type: ignore[operator]
    size = None if network.params is None else network.params * FP32_BYTES
    cells = (
        Cell(name),
        Cell(meaning),
        Cell(units.accuracy(network.accuracy)),
        Cell("" if dense is None else units.points(difference)),
        _counted(network.params),
        Cell("") if dense is None else _changed(dense.params, network.params),
        Cell(units.size(size), detail=units.exact(size)),
        _counted(network.macs),
        Cell("") if dense is None else _changed(dense.macs, network.macs),
        Cell(units.milliseconds(network.latency_ms)),
    )
    return Row(cells, strong=strong)


def layers(run: RunData) -> Table:
    """Every planned layer: shape, modes, ranks, costs before and after, conversion error, notes."""
    columns = (
        ("layer", False), ("kind", False), ("shape", True), ("modes in", True), ("modes out", True),
        ("ranks", True), ("runs as", False), ("params", True), ("after", True), ("cut", True), ("MACs", True),
        ("after ", True), ("cut ", True), ("error", True),
    )  # fmt: skip
    rows = tuple(_layer(layer, run) for layer in run.plan.layers)
    return Table(columns, rows, foot=_totals(run)).without_empty_columns("runs as", "error")


def _layer(layer: Layer, run: RunData) -> Row:
    own_method = layer.method and layer.method != run.plan.method
    cells = (
        Cell(layer.name),
        Cell(f"{layer.kind} {layer.method}".strip() if own_method else layer.kind or units.ABSENT),
        Cell(units.integers(layer.shape, " x ")),
        Cell(units.integers(layer.modes_in, " x ")),
        Cell(units.integers(layer.modes_out, " x ")),
        Cell(units.integers(layer.ranks)),
        Cell(layer.resolved_execution or units.ABSENT),
        *_cost_cells([getattr(layer, f"{cost}_{when}") for cost in _COSTS for when in ("before", "after")], bar=True),
        Cell(units.share(run.outcome.conversion.get(layer.name))),
    )
    return Row(cells, note="; ".join(_notes(layer)))


def _cost_cells(costs: Sequence[float | None], *, bar: bool) -> tuple[Cell, ...]:
    """Before, after, cut for parameters and then for MACs."""
    pairs = (costs[0:2], costs[2:4])
    return tuple(
        cell
        for before, after in pairs
        for cell in (_counted(before), _counted(after), _changed(before, after, bar=bar))
    )


def _notes(layer: Layer) -> list[str]:
    shared = [f"shared with {', '.join(layer.aliases)}"] if layer.aliases else []
    called = [f"called {layer.calls} times per image"] if layer.calls is not None and layer.calls > 1 else []
    return [*shared, *called, *layer.notes]


def _totals(run: RunData) -> tuple[Row, ...]:
    """The plan's own totals, and the sum of the rows where it differs (totals also count what stays dense)."""
    if not run.plan.layers:
        return ()
    keys = [f"{cost}_{when}" for cost in _COSTS for when in ("before", "after")]
    stated = [run.plan.totals.get(key) for key in keys]
    columns = [[getattr(layer, key) for layer in run.plan.layers] for key in keys]
    sums = [None if None in column else float(sum(column)) for column in columns]
    rows = [("these layers together", sums), ("whole model", stated)]
    shown = [rows[1]] if stated == sums else [row for row in rows if any(value is not None for value in row[1])]
    blank = (Cell(""),) * 6
    return tuple(Row((Cell(name), *blank, *_cost_cells(costs, bar=False), Cell(""))) for name, costs in shown)


def skipped(run: RunData) -> Table:
    """Layers left dense, each with its reason."""
    rows = tuple(Row((Cell(name), Cell(why or units.ABSENT))) for name, why in run.plan.skipped.items())
    return Table((("layer", False), ("why it was left dense", False)), rows)


def origin(run: RunData) -> Table:
    """Where the numbers come from: command, seed, time, versions."""
    outcome = run.outcome
    spent = [f"{PHASES.get(phase, phase)} {units.duration(value)}" for phase, value in outcome.seconds.items()]
    pairs = {
        "command": outcome.command,
        "seed": outcome.seed,
        "time": ", ".join(spent),
        **outcome.versions,
    }
    rows = tuple(Row((Cell(name), Cell(value or units.ABSENT))) for name, value in pairs.items())
    return Table((("", False), (" ", False)), rows)


def sweep(runs: Sequence[RunData]) -> Table:
    """One row per run, failed and unfinished ones included; the best compressed accuracy stands out."""
    columns = (
        ("run", False), ("state", False), ("ADMM", False), ("approx. error", True), ("dense", True),
        ("truncated", True), ("compressed", True), ("params", True), ("MACs", True), ("time", True),
    )  # fmt: skip
    best = best_run(runs)
    return Table(columns, tuple(_sweep_row(run, best=run is best) for run in runs))


def _sweep_row(run: RunData, *, best: bool) -> Row:
    residual = run.outcome.primal_residual
    spent = run.outcome.seconds
    report = run.folder / "report.html"
    cells = (
        Cell(run.label, link=f"{quote(run.folder.name)}/report.html" if report.exists() else ""),
        Cell("failed" if run.problem else progress(run)),
        Cell(run.outcome.status or units.ABSENT),
        Cell(units.share(residual if residual is not None else run.last("admm/primal_residual"))),
        *(Cell(units.accuracy(run.network(name).accuracy)) for name in ("dense", "truncated", "compressed")),
        Cell(units.change(run.reduction("params"))),
        Cell(units.change(run.reduction("macs"))),
        Cell(units.duration(sum(spent.values()) if spent else None)),
    )
    return Row(cells, note=run.problem, strong=best)
