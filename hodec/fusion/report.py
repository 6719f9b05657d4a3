"""FuseReport: the variant that ``fuse`` chose for each layer, and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hodec.text_table import human, rendered


@dataclass(frozen=True)
class LayerChoice:
    """One factorized layer.

    Attributes:
        variant: what it became: ``merged``, ``chain``, ``dense``, or kernel sizes such as ``3x3, 1x1``.
        reason: why.
        macs: variant -> multiply-adds of one image.
        ms: variant -> median milliseconds with the example input; empty where nothing was measured.
        norm: the batch norm that was folded into it, or an empty string.
    """

    variant: str
    reason: str
    macs: Mapping[str, int]
    ms: Mapping[str, float]
    norm: str = ""

    @property
    def speedup(self) -> float | None:
        """Milliseconds of the dense variant over those of the chosen one."""
        return self.ms["dense"] / self.ms[self.variant] if {"dense", self.variant} <= self.ms.keys() else None


@dataclass(frozen=True)
class FuseReport:
    """One fused net.

    Attributes:
        target: ``latency`` or ``macs``.
        device: what times were measured on.
        inputs: shapes of the example inputs.
        layers: name -> choice, of each factorized layer.
        folded: batch norm -> the layer it was folded into, dense layers among them.
        kept: batch norm -> why it stays.
        memory_format: ``channels_last`` or ``contiguous``.
        whole_ms: median milliseconds of the net: ``fused``, ``dense`` (the same net with dense layers), and the
            memory formats that were tried.
        error: relative difference between the outputs of the fused and of the given net.
    """

    target: str
    device: str
    inputs: tuple[tuple[int, ...], ...]
    layers: Mapping[str, LayerChoice]
    folded: Mapping[str, str]
    kept: Mapping[str, str]
    memory_format: str
    whole_ms: Mapping[str, float]
    error: float

    def __str__(self) -> str:
        return rendered(report_table(self))


def report_table(report: FuseReport) -> Group:
    """A rich renderable."""
    counts = Counter(choice.variant for choice in report.layers.values())
    chosen = ", ".join(f"{n} {variant}" for variant, n in counts.items()) or "no factorized layer"
    table = Table(title=f"Fused for {report.target} on {report.device}: {chosen}; {len(report.folded)} norms folded")
    for heading in ("layer", "runs as", "norm folded in"):
        table.add_column(heading, overflow="fold")
    for heading in ("MACs", "dense", "ms", "dense", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for name, choice in report.layers.items():
        table.add_row(name or "(the model)", choice.variant, choice.norm, *_figures(choice), choice.reason)
    sizes = "; ".join("x".join(map(str, shape)) for shape in report.inputs)
    whole = ", ".join(f"{name} {ms:.3g} ms" for name, ms in report.whole_ms.items())
    lines = [f"whole net at {sizes}, memory format {report.memory_format}" + (f": {whole}" if whole else "")]
    lines += [f"outputs differ by {report.error:.1e} of their norm"]
    lines += [f"norm kept: {name}: {reason}" for name, reason in report.kept.items()]
    return Group(table, Text("\n".join(lines)))


def _figures(choice: LayerChoice) -> list[str]:
    speedup = choice.speedup
    return [
        human(choice.macs.get(choice.variant, 0)),
        human(choice.macs.get("dense", 0)),
        f"{choice.ms[choice.variant]:.3g}" if choice.variant in choice.ms else "",
        f"{choice.ms['dense']:.3g}" if "dense" in choice.ms else "",
        f"{speedup:.2f}" if speedup else "",
    ]
