"""Writes the report of a run and of a sweep: HTML that opens anywhere offline, Markdown, and the figures as files."""

import logging
import os
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from hodec.admm.options import WEAK_PULL
from hodec.experiment.report import style, table, words
from hodec.experiment.report.collect import collect, collect_runs, collect_sweep
from hodec.experiment.report.figures import COSTS, CURVES, LEAD, SWEEP, FigureSpec, NothingToDraw
from hodec.experiment.report.rundata import NETWORKS, PHASES, RunData, cut, series
from hodec.io.atomic import write_text, writing
from hodec.text_table import accuracy, change, duration, human, number, percent

log = logging.getLogger(__name__)

# The one script of a page, and what the page's policy knows it by: no other runs.
SORT = (style.TEMPLATES / "sort.js").read_text("utf-8")
SORT_HASH = f"sha256-{b64encode(sha256(SORT.encode()).digest()).decode()}"
WAY_OUT = "free some space, or copy the folder to where you may write and make the report there (hodec report)"


@dataclass(frozen=True)
class Drawn:
    """A figure of a report, or the reason why there is none."""

    name: str
    figure: Figure | None = None
    svg: str = ""
    reason: str = ""


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``figures/`` into a run folder; returns the path of the HTML.

    Raises:
        CheckpointError: a file of the run is broken, or the folder cannot be written to.
    """
    run = collect(run_folder)
    drawn = draw_all(run)
    path = run.folder / "report.html"
    with writing(run.folder, way_out=WAY_OUT):
        for each in drawn:
            _save_or_remove(run.folder / "figures" / each.name, each)
        write_text(run.folder / "report.md", render_markdown(run, drawn))
        write_text(path, render_html(run, drawn))
    return path


def write_sweep(folder: str | Path) -> Path:
    """Write the page, the figures and the tables of a multirun; returns the path of ``sweep.html``.

    Beside it are ``sweep.csv``, ``sweep.json``, ``sweep.md`` and ``sweep.tex``; see ``table``. Where the runs differ in
    the MACs they cut, ``sweep-tradeoff`` shows what that cost in accuracy.

    Raises:
        CheckpointError: the folder holds no runs or cannot be written to. A broken run is a row of the table.
    """
    root = Path(folder)
    return _write_runs(root, collect_sweep(folder), f"hodec sweep · {root.resolve().name}")


def write_comparison(folders: Sequence[str | Path], root: str | Path) -> Path:
    """Write the page, the figures and the tables of any runs into ``root``, as of a sweep; the path of the HTML.

    Raises:
        CheckpointError: one of them is no run, or ``root`` cannot be written to.
    """
    runs = collect_runs(folders)
    with writing(Path(root), way_out=WAY_OUT):
        Path(root).mkdir(parents=True, exist_ok=True)
    return _write_runs(Path(root), runs, "hodec comparison")


def _write_runs(root: Path, runs: Sequence[RunData], kicker: str) -> Path:
    drawn = [draw(spec, runs) for spec in SWEEP]
    links = {run.folder: os.path.relpath(run.folder, root) for run in runs}
    shown = {"runs": runs, "best": words.best_run(runs), "error": words.ERROR, "curves": drawn, "links": links}
    seeds = table.cells(runs) if any("seed" in run.settings for run in runs) else None
    strong = table.best_group(table.groups(runs))
    head = {"kicker": kicker, "headline": table.headline(runs), "seeds": seeds, "strong": strong, "note": table.NOTE}
    text = _environment().get_template("sweep.html.j2").render(shown | head)
    with writing(root, way_out=WAY_OUT):
        for each in drawn:
            _save_or_remove(root / each.name, each)
        for ending, content in table.TABLES.items():
            write_text(root / f"sweep.{ending}", content(runs))
        write_text(root / "sweep.html", text)
    return root / "sweep.html"


def draw_all(run: RunData) -> list[Drawn]:
    """Every figure that the run holds numbers for, and the reason why another is absent."""
    return [draw(spec, run) for spec in (LEAD, *CURVES, *COSTS)]


def draw(spec: FigureSpec, subject: RunData | Sequence[RunData]) -> Drawn:
    """One figure, or the reason why it is absent."""
    try:
        figure = spec.draw(subject)
    except NothingToDraw as reason:
        return Drawn(spec.name, reason=str(reason))
    return Drawn(spec.name, figure, style.to_svg(figure))


def render_html(run: RunData, drawn: Sequence[Drawn]) -> str:
    """The report as one HTML page without any outside reference."""
    return _environment().get_template("report.html.j2").render(_contents(run, drawn))


def render_markdown(run: RunData, drawn: Sequence[Drawn]) -> str:
    """The same report in Markdown; figures are references to the PNG files that ``write_report`` writes."""
    text = _environment(markdown=True).get_template("report.md.j2").render(_contents(run, drawn))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _contents(run: RunData, drawn: Sequence[Drawn]) -> dict[str, object]:
    """Every variable of the templates of a run's report."""
    dense = run.network(run.reference)
    tone, verdict = words.verdict(run)
    # the middle one: a schedule that ends at learning rate 0 takes every pull to 0 with it
    pulls = series(run.phase("admm"), "admm/pull")
    return {
        "run": run,
        "plan": run.plan,
        "scripted": bool(run.plan),
        "results": run.results,
        "kicker": f"hodec report · {run.label}",
        "headline": words.headline(run),
        "dense": dense,
        "outcome": words.outcome(run),
        "retraining": words.retraining(run),
        "lead": [each for each in drawn if each.name == LEAD.name],
        "compressed_bytes": run.compressed_bytes,
        "points": lambda score: None if None in (score, dense.test_accuracy) else score - dense.test_accuracy,
        "tone": tone,
        "verdict": verdict,
        "residuals": series(run.phase("admm"), "admm/primal_residual"),
        "pull": median(pulls) if pulls else None,
        "weak_pull": WEAK_PULL,
        "error": words.ERROR,
        "drawn": [each for each in drawn if each.name != LEAD.name],
        "costs": [spec.name for spec in COSTS],
        "notes": _layer_notes(run),
        "config": OmegaConf.to_yaml(OmegaConf.create(dict(run.config))) if run.config else "",
    }


def _layer_notes(run: RunData) -> dict[str, list[str]]:
    """Note -> the layers that it is about."""
    notes: dict[str, list[str]] = {}
    for name, layer in (run.plan or {}).items():
        calls = sum(times for times, _, _ in layer.call_sites.calls)
        others = [*layer.aliases, *(tie.name for tie in layer.ties)]
        shared = [f"shared with {', '.join(others)}"] if others else []
        called = [f"called {calls} times per image"] if calls > 1 else []
        for note in (*shared, *called, *layer.notes):
            notes.setdefault(note, []).append(name)
    return notes


@cache
def _environment(*, markdown: bool = False) -> Environment:
    """Templates that escape every value, for HTML, or for Markdown as well."""
    made = Environment(
        loader=FileSystemLoader(style.TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escaped if markdown else None,
    )
    made.globals |= {"cut": cut, "meanings": NETWORKS, "phases": PHASES}
    made.globals |= {"sort_script": Markup(SORT), "sort_hash": SORT_HASH}
    made.filters |= {show.__name__: show for show in (human, number, accuracy, percent, change, duration)}
    made.filters |= {"progress": words.progress, "fenced": _fenced, "prose": _prose}
    made.filters["inlined"] = lambda each, title: Markup(style.inlined(each.svg, each.name, title))
    return made


def _prose(text: Markup) -> Markup:
    """Running text on one line, in which a number and its percent sign stay together."""
    return Markup(re.sub(r"[ \n]+", " ", text).replace(" %", "\u00a0%").strip())


def _escaped(value: object) -> Markup:
    """Text with the signs escaped that Markdown or inline HTML would act on."""
    if isinstance(value, Markup):
        return value
    flat = (
        re.sub(r"[ \t\r\n]+", " ", str(value)).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return Markup(re.sub(r"([\\`*_\[\]|#$~])", r"\\\1", flat))


def _fenced(yaml: str) -> Markup:
    """A code block whose fence is longer than any run of backticks inside."""
    if "<" in yaml:  # names of layers may hold tags, which not every reader leaves alone inside a fence
        return Markup(f"<pre>\n{escape(yaml.rstrip())}\n</pre>")
    longest = max((len(run) for run in re.findall(r"`+", yaml)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}yaml\n{yaml.rstrip()}\n{fence}") if yaml else Markup()


def _save_or_remove(path: Path, drawn: Drawn) -> None:
    """Write a figure; where there is none now, remove the one that an earlier report left."""
    if drawn.figure is not None:
        style.save(path, drawn.figure, drawn.svg)
        return
    for ending in (".png", ".svg"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
