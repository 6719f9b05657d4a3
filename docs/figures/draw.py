"""Draw the figures of the pages: ``python docs/figures/draw.py`` writes the SVG files beside it.

``runs.json`` and ``spectrum.json`` are what was measured; the costs of the third figure are computed here, by hodec's
own formats.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hodec.experiment.report.style import INKS, TEMPLATES, colors, panels, styled, to_svg
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.methods import METHODS

HERE = Path(__file__).parent
STAGES = ("dense", "truncated", "+ BatchNorm\nre-estimated", "retrained")

# ResNet-18's layer3.0.conv1: 128 to 256 channels, 3x3, stride 2, on 28 x 28 positions
SHAPE, BEFORE, AFTER = (256, 128, 3, 3), (28, 28), (14, 14)


@styled
def what_it_does() -> Figure:
    """The first page's: a layer's spectrum, the costs, and the accuracy, with ADMM and without."""
    runs = json.loads((HERE / "runs.json").read_text(encoding="utf-8"))
    figure, (spectrum, costs, accuracy) = panels(3, 2.5, width=9.6)
    both = {"admm": ("with ADMM", INKS["blue"]), "off": ("without", INKS["orange"])}
    for name, (label, ink) in both.items():
        values = runs[name]["spectrum"]
        spectrum.plot(range(1, len(values) + 1), values, color=ink, label=label)
        shares = [100 * share for share in runs[name]["accuracy"]]
        accuracy.plot(range(len(STAGES)), shares, color=ink, marker="o", label=label)
    cut(spectrum, runs["rank"])
    spectrum.set(
        title=f"1  Train: singular values of {runs['layer']}",
        xlabel="singular values, the largest first",
        ylim=(0, 1.05),
    )
    spectrum.legend(loc="upper right")
    bars(costs, {"parameters": runs["admm"]["params"], "multiply-adds": runs["admm"]["macs"]})
    costs.set_title("2  Convert: what is left of the net")
    accuracy.set(title="3  Test accuracy, %", ylim=(0, 108), xlim=(-0.3, 3.3))
    accuracy.set_xticks(range(len(STAGES)), STAGES, fontsize=7)
    accuracy.legend(loc="lower right")
    return figure


def cut(axes: Axes, rank: int) -> None:
    """Where the plan cuts a spectrum."""
    axes.axvline(rank + 0.5, color=INKS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
    axes.text(rank + 1.5, 0.03, f"rank {rank}", color=INKS["muted"], fontsize=7.5, transform=axes.get_xaxis_transform())


def bars(axes: Axes, pairs: dict[str, list[int]]) -> None:
    """What is left, full, on what there was, pale; in per cent, with the numbers beside it."""
    for at, (before, after) in enumerate(pairs.values()):
        share = 100 * after / before
        axes.barh(at, 100, color=INKS["soft"], height=0.5)
        axes.barh(at, share, color=INKS["blue"], height=0.5)
        axes.text(share + 3, at, f"{share:.1f} %: {before:,} to {after:,}", va="center", fontsize=7.5)
    axes.set(xlim=(0, 104), ylim=(1.7, -0.7))
    axes.set_yticks(range(len(pairs)), list(pairs))
    axes.grid(axis="y", visible=False)


@styled
def spectrum_over_epochs() -> Figure:
    """What ADMM does to a layer's spectrum, an epoch a line."""
    data = json.loads((HERE / "spectrum.json").read_text(encoding="utf-8"))
    figure, both = panels(2, 3.0, width=8.4)
    titles = {"admm": "With ADMM", "plain": "Without"}
    for axes, (name, title) in zip(both, titles.items(), strict=True):
        run = data[name]
        epochs = len(run["spectra"]) - 1
        shown = [epoch for epoch in (0, 2, 4, 6, 8, 10, 12, epochs) if epoch <= epochs]
        for epoch, ink in zip(shown, colors(9), strict=False):
            values = [max(value, 1e-6) for value in run["spectra"][epoch]]
            label = "before training" if epoch == 0 else f"epoch {epoch}"
            axes.plot(range(1, len(values) + 1), values, color=ink, label=label, linewidth=1.3)
        cut(axes, run["rank"])
        accuracy = f"{100 * run['dense']:.1f} % dense, {100 * run['truncated']:.1f} % cut"
        axes.set(
            title=f"{title}: {accuracy}", xlabel="singular values, the largest first", yscale="log", ylim=(1e-4, 1.3)
        )
        axes.yaxis.set_major_formatter("{x:g}")
    both[0].set_ylabel("over the largest one")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def costs(method: str, rank: int) -> tuple[float, float]:
    """Parameters and multiply-adds of the layer at ranks of at most ``rank``, as shares of the dense layer's."""
    fmt, modes = METHODS[method].format("conv2d"), Modes.split(SHAPE[1], SHAPE[0], 2)
    ranks = fmt.fit_ranks(SHAPE, modes, [rank] * len(fmt.max_ranks(SHAPE, modes)))
    out, inp, *kernel = SHAPE
    weights = out * inp * kernel[0] * kernel[1]
    sites = CallSites.once(BEFORE, AFTER)
    macs = fmt.macs(SHAPE, ranks, modes, call_sites=sites, execution="chain")
    return fmt.params(SHAPE, ranks, modes) / weights, macs / (weights * AFTER[0] * AFTER[1])


@styled
def macs_of_two_orders() -> Figure:
    """Multiply-adds of the classical tensor train and of HODEC's order, over the ranks and over the parameters."""
    figure, (by_rank, by_size) = panels(2, 3.0, width=8.4)
    named = {"tt_classical": ("classical", INKS["orange"]), "tt": ("contract, convolve, expand", INKS["blue"])}
    for method, (label, ink) in named.items():
        ranks = range(2, 129, 2)
        params, macs = zip(*(costs(method, rank) for rank in ranks), strict=True)
        by_rank.plot(ranks, macs, color=ink, label=label)
        by_size.plot([100 * share for share in params], macs, color=ink, label=label)
    for axes in (by_rank, by_size):
        axes.axhline(1, color=INKS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set(yscale="log", ylim=(0.005, 15))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(loc="lower right")
    by_rank.set(title="Multiply-adds over those of the dense layer", xlabel="ranks at most")
    by_rank.text(104, 1.12, "dense", color=INKS["muted"], fontsize=7.5)
    by_size.set(title="The same by size", xlabel="parameters left, %", xlim=(0, 60))
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "what_it_does": what_it_does,
    "spectrum": spectrum_over_epochs,
    "macs": macs_of_two_orders,
}


def adaptive(svg: str) -> str:
    """The same picture with its colours as CSS variables that follow the reader's light or dark."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    dark = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", css.split("prefers-color-scheme: dark")[1].split("}")[0]))
    for name, ink in INKS.items():
        svg = svg.replace(ink, f"var(--{name})")
    light, night = ("".join(f"--{name}: {ink}; " for name, ink in inks.items()) for inks in (INKS, dark))
    style = f"<style>:root {{ {light}}} @media (prefers-color-scheme: dark) {{ :root {{ {night}}} }}</style>"
    at = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:at]}\n {style}{svg[at:]}"


def main() -> None:
    """Write every figure."""
    for name, draw in FIGURES.items():
        (HERE / f"{name}.svg").write_text(adaptive(to_svg(draw())), encoding="utf-8")


if __name__ == "__main__":
    main()
