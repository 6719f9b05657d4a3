"""Writes the report of a run and of a sweep: HTML that opens anywhere offline, Markdown, and the figures as files."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from hodec.errors import CheckpointError
from hodec.experiment.report import canvas, figures, markdown, page, tables, words
from hodec.experiment.report.collect import collect, collect_sweep
from hodec.experiment.report.page import Html, element, joined
from hodec.experiment.report.rundata import RunData
from hodec.io.atomic import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FigureSpec:
    """How a figure is drawn and explained; ``name`` is its file name and its id on the page."""

    name: str
    title: str
    caption: str
    draw: Callable[..., Figure]


CURVES = (
    FigureSpec(
        "approximation-error",
        "Approximation error",
        "How far the weights W are from their low-rank copy Z, relative to their norm. Falling lines mean that "
        "ADMM works; what is left at the end is what truncation cuts off.",
        figures.approximation_error,
    ),
    FigureSpec(
        "training-curves",
        "Training",
        "Loss and accuracy over all phases. The dashed line is the accuracy that the network would have if it were "
        "cut to the planned ranks in that epoch: ADMM has done its work when it meets the solid one.",
        figures.training_curves,
    ),
    FigureSpec(
        "dual-and-rho",
        "Dual residual and penalty",
        "The dual residual says how much Z still moves between two updates; rho is how strongly W is pulled to Z.",
        figures.dual_and_rho,
    ),
)
COSTS = FigureSpec(
    "layer-costs",
    "Cost of each layer",
    "Parameters and MACs before (pale) and after (full) factorization, in the order of the network.",
    figures.layer_costs,
)
SWEEP = (
    FigureSpec(
        "sweep",
        "ADMM in each run",
        "A run works when its approximation error falls and its dashed accuracy rises to the solid one. A run without "
        "ADMM shows its dense training.",
        figures.sweep,
    ),
    FigureSpec("sweep-tradeoff", "What accuracy costs", "Up and to the right is better.", figures.tradeoff),
)

#: Figure name -> the figure, or the sentence that says why there is none.
Drawn = Mapping[str, Figure | str]

_UNFINISHED = "This run has not finished: it has no metrics.json yet, so the measured results are missing."
_NO_SKIPPED = "The plan lists no layer that was left dense."
_LAYERS_NOTE = (
    "Shape is out x in x kernel; ranks stand in the order of the modes, kernel between in and out. Error is the "
    "relative distance of the factorized weight from the trained one, before retraining."
)
_SWEEP_NOTE = (
    "Accuracies are measured on the test data, the highest compressed one in bold; each is one run, so small "
    "differences may be chance, and settings are better chosen by validation accuracy. Params and MACs are changes "
    "against dense. "
    f"Approx. error is {words.ERROR} at the end of ADMM. {words.CONVENTIONS}"
)


def draw_all(run: RunData) -> Drawn:
    """Draw every figure that the run holds numbers for."""
    return {spec.name: _drawn(spec, run) for spec in (*CURVES, COSTS)}


def _drawn(spec: FigureSpec, subject: object) -> Figure | str:
    try:
        return spec.draw(subject)
    except figures.NothingToDraw as reason:
        return str(reason)


def render_html(run: RunData, drawn: Drawn | None = None) -> str:
    """The report as one HTML page without any outside reference.

    Args:
        run: What ``collect`` read.
        drawn: Figures from ``draw_all``, where they are drawn already.
    """
    ready = draw_all(run) if drawn is None else drawn
    return page.page(
        words.headline(run),
        _opening(run),
        page.table(tables.results(run), name="results"),
        element("p", words.CONVENTIONS, class_="small"),
        _verdict(run),
        element("h2", "Curves"),
        *(_figure(spec, ready[spec.name]) for spec in CURVES),
        element("h2", "Layers"),
        _figure(COSTS, ready[COSTS.name]),
        _layers(run),
        element("h2", "Where this comes from"),
        _origin(run),
    )


def _opening(run: RunData) -> Html:
    facts = joined(*(element("span", fact) for fact in words.facts(run)))
    return joined(
        element("p", f"hodec report · {run.label}", class_="kicker"),
        element("h1", _tight(words.headline(run))),
        element("p", facts, class_="facts") if facts else Html(),
        Html() if run.finished else element("p", _UNFINISHED, class_="facts"),
        element("h2", "Result"),
        between="\n",
    )


def _tight(text: str) -> str:
    """Running text in which a number and its percent sign stay on one line."""
    return text.replace(" %", "\u00a0%")


def _verdict(run: RunData) -> Html:
    verdict = words.verdict(run)
    said = (element("h2", verdict.title), element("p", _tight(verdict.text)))
    return element("section", *said, class_=f"verdict {verdict.tone}")


def _figure(spec: FigureSpec, drawn: Figure | str) -> Html:
    if isinstance(drawn, str):
        return element("p", element("b", spec.title), f" is left out. {drawn}", class_="absent")
    svg = Html(canvas.inline_svg(drawn, spec.name, f"{spec.title}. {spec.caption}"))
    caption = element("figcaption", element("b", f"{spec.title}."), f" {spec.caption}")
    return element("figure", svg, caption, id=spec.name)


def _layers(run: RunData) -> Html:
    plan = run.plan
    # without layers, the sentence in place of their figure has said so already
    planned = page.table(tables.layers(run), name="layers") if plan.layers else Html()
    note = element("p", _LAYERS_NOTE, class_="small") if plan.layers else Html()
    none = element("p", _NO_SKIPPED, class_="absent")
    dense = page.table(tables.skipped(run), name="skipped") if plan.skipped else none
    return joined(planned, note, element("h2", "Left dense"), dense)


def _origin(run: RunData) -> Html:
    facts = page.table(tables.origin(run), name="origin")
    config = element("pre", _yaml(run) or "config.yaml is absent.")
    return joined(
        element("details", element("summary", "Command, seed, time, versions"), facts),
        element("details", element("summary", "Config"), config),
    )


def _yaml(run: RunData) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dict(run.config))) if run.config else ""


def render_markdown(run: RunData, drawn: Drawn | None = None) -> str:
    """The same report in Markdown; figures are references to the PNG files that ``write_report`` writes."""
    ready = draw_all(run) if drawn is None else drawn
    plan, verdict = run.plan, words.verdict(run)
    parts = [
        f"# {markdown.text(words.headline(run))}",
        markdown.text(", ".join(words.facts(run))),
        "" if run.finished else markdown.text(_UNFINISHED),
        markdown.table(tables.results(run)),
        words.CONVENTIONS,
        f"## {markdown.text(verdict.title)}",
        markdown.text(verdict.text),
        "## Curves",
        *(_markdown_figure(spec, ready[spec.name]) for spec in CURVES),
        "## Layers",
        _markdown_figure(COSTS, ready[COSTS.name]),
        markdown.table(tables.layers(run)) if plan.layers else "",
        _LAYERS_NOTE if plan.layers else "",
        "## Left dense",
        markdown.table(tables.skipped(run)) if plan.skipped else _NO_SKIPPED,
        "## Where this comes from",
        markdown.table(tables.origin(run)),
        markdown.fenced(_yaml(run), "yaml") if run.config else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_figure(spec: FigureSpec, drawn: Figure | str) -> str:
    if isinstance(drawn, str):
        return f"**{spec.title}** is left out. {markdown.text(drawn)}"
    return f"![{spec.title}](figures/{spec.name}.png)\n\n*{spec.title}.* {spec.caption}"


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``figures/`` into a run folder; returns the path of the HTML.

    Raises:
        CheckpointError: A file of the run is broken, or the folder cannot be written to.
    """
    run = collect(run_folder)
    drawn = draw_all(run)
    path = run.folder / "report.html"
    with _writing_to(run.folder):
        for name, figure in drawn.items():
            _save_or_clear(run.folder / "figures" / name, figure)
        write_text(run.folder / "report.md", render_markdown(run, drawn))
        write_text(path, render_html(run, drawn))
    return path


def write_sweep(folder: str | Path) -> Path:
    """Write ``sweep.html``, ``sweep.png`` and ``sweep.svg`` for a multirun; returns the path of the HTML.

    Where the runs differ in the MACs they cut, ``sweep-tradeoff`` shows what that cost in accuracy.

    Raises:
        CheckpointError: The folder holds no runs or cannot be written to. A broken run is a row of the table.
    """
    root, runs = Path(folder), collect_sweep(folder)
    drawn = {spec.name: _drawn(spec, runs) for spec in SWEEP}
    head = words.sweep_headline(runs)
    text = page.page(
        head,
        element("p", f"hodec sweep · {root.resolve().name}", class_="kicker"),
        element("h1", _tight(head)),
        element("h2", "CallSites"),
        page.table(tables.sweep(runs), name="sweep"),
        element("p", _SWEEP_NOTE, class_="small"),
        element("h2", "Curves"),
        *(_figure(spec, drawn[spec.name]) for spec in SWEEP),
    )
    with _writing_to(root):
        for name, figure in drawn.items():
            _save_or_clear(root / name, figure)
        write_text(root / "sweep.html", text)
    return root / "sweep.html"


def _save_or_clear(path: Path, drawn: Figure | str) -> None:
    """Write a figure; where there is none now, take away the one that an earlier report left."""
    if not isinstance(drawn, str):
        canvas.save(drawn, path)
        return
    for ending in (".png", ".svg"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """A full disk or a missing right becomes an error that says what to do; files written before stay whole."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the report cannot be written into {folder} ({error.strerror}). Free some space, or copy the folder to "
            f"where you may write and make the report there (`hodec report`)"
        ) from error
