"""What ``fuse`` chose for each layer, and why."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hodec.text_table import human


@dataclass(frozen=True)
class LayerChoice:
    """One factorized layer.

    Attributes:
        form: what it became: ``merged``, ``chain``, ``dense``, or kernel sizes such as ``3x3, 1x1``.
        reason: why.
        macs: form -> multiply-adds of one image.
        ms: form -> median milliseconds with the example input; empty where nothing was measured.
        norm: the batch norm that was folded into it, or an empty string.
    """

    form: str
    reason: str
    macs: Mapping[str, int]
    ms: Mapping[str, float]
    norm: str = ""

    @property
    def speedup(self) -> float | None:
        """Milliseconds of the dense form over those of the chosen one."""
        return self.ms["dense"] / self.ms[self.form] if "dense" in self.ms and self.form in self.ms else None


@dataclass(frozen=True)
class FuseReport:
    """The whole net.

    Attributes:
        target: ``latency`` or ``macs``.
        device: what times were measured on.
        inputs: shapes of the example inputs.
        layers: name -> choice, of each factorized layer.
        folded: batch norm -> the layer it was folded into, dense layers among them.
        kept: batch norm -> why it stays.
        memory_format: ``channels_last`` or ``contiguous``.
        whole_ms: median milliseconds of the whole net: ``fused``, ``dense`` (the same net with dense layers), and the
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
        text = io.StringIO()
        Console(file=text, width=150, color_system=None).print(report_table(self))
        return text.getvalue()


def report_table(report: FuseReport) -> Group:
    """A rich renderable."""
    counts = [choice.form for choice in report.layers.values()]
    forms = ", ".join(f"{counts.count(form)} {form}" for form in dict.fromkeys(counts)) or "no factorized layer"
    table = Table(title=f"Fused for {report.target} on {report.device}: {forms}; {len(report.folded)} norms folded")
    for heading in ("layer", "runs as", "norm folded in"):
        table.add_column(heading, overflow="fold")
    for heading in ("MACs", "dense", "ms", "dense", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for name, choice in report.layers.items():
        table.add_row(name or "(the model)", choice.form, choice.norm, *_numbers(choice), choice.reason)
    sizes = "; ".join("x".join(map(str, shape)) for shape in report.inputs)
    whole = ", ".join(f"{name} {ms:.3g} ms" for name, ms in report.whole_ms.items())
    lines = [f"whole net at {sizes}, memory format {report.memory_format}" + (f": {whole}" if whole else "")]
    lines += [f"outputs differ by {report.error:.1e} of their norm"]
    lines += [f"norm kept: {name}: {reason}" for name, reason in report.kept.items()]
    return Group(table, Text("\n".join(lines)))


def _numbers(choice: LayerChoice) -> list[str]:
    speedup = choice.speedup
    return [
        human(choice.macs.get(choice.form, 0)),
        human(choice.macs.get("dense", 0)),
        f"{choice.ms[choice.form]:.3g}" if choice.form in choice.ms else "",
        f"{choice.ms['dense']:.3g}" if "dense" in choice.ms else "",
        f"{speedup:.2f}" if speedup else "",
    ]
