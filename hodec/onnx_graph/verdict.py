"""What hodec compress says: one line, and the figures behind it, each measured on the written file."""

from collections.abc import Mapping
from dataclasses import dataclass

from hodec.cost.count import Cost
from hodec.onnx_graph.bench import Bench
from hodec.onnx_graph.changes import Change
from hodec.plan.plan import Plan


@dataclass(frozen=True)
class Compressed:
    """A file that was compressed.

    Attributes:
        changes: node -> what became of it.
        judge: what the score is.
        dense, score: of the dense file and of the written one, on held-out data.
        allowed: how much the score might drop, in its own unit.
        chance: what the loss says of other inputs, in sentences.
        scale, unit: how scores are printed.
        samples: that were fitted to, and that were held out.
        words: what the data were made from.
        before, after: parameters and multiply-adds of one image.
        uncounted: nodes whose multiply-adds are in neither count.
        bench: latency of both files.
        threads: of onnxruntime while searching.
        layers: that could be decomposed.
        remarks: what else was done, or could not be checked.
        rows: the table of files in float and in 8 bits, where that was asked for.
    """

    output: str
    plan: Plan
    changes: Mapping[str, Change]
    judge: str
    dense: float
    score: float
    allowed: float
    scale: float
    unit: str
    samples: tuple[int, int]
    words: str
    before: Cost
    after: Cost
    uncounted: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    bench: Bench
    threads: int
    layers: int
    remarks: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    chance: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One line."""
        kept, dense = (f"{one * self.scale:.4g}" for one in (self.score, self.dense))
        return (
            f"keeps {kept} of {dense}{self.unit}, {self.bench.speedup:.2f}x as fast, "
            f"{self.bytes_after / self.bytes_before:.2f} of the size, "
            f"{self.after.macs / max(1, self.before.macs):.2f} of the multiply-adds; "
            f"{len(self.plan)} of {self.layers} layers decomposed"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "output": self.output,
            "verdict": self.verdict,
            "judge": self.judge,
            "score": [self.dense, self.score],
            "allowed": self.allowed,
            "chance": list(self.chance),
            "samples": list(self.samples),
            "data": self.words,
            "params": [self.before.params, self.after.params],
            "macs": [self.before.macs, self.after.macs],
            "bytes": [self.bytes_before, self.bytes_after],
            "latency": self.bench.to_dict(),
            "uncounted": list(self.uncounted),
            "changes": {name: change.to_dict() for name, change in self.changes.items()},
            "skipped": dict(self.plan.skipped),
            "threads": self.threads,
            "remarks": list(self.remarks),
            "rows": list(self.rows),
        }

    def __str__(self) -> str:
        fit, held = self.samples
        without = f" without {', '.join(self.uncounted)}, which cannot be counted" if self.uncounted else ""
        lines = [
            self.verdict,
            f"data: {self.words}; fitted to {fit} samples, judged by {held} that were held out",
            f"score: {self.judge}; {self.allowed * self.scale:.3g}{self.unit} may be lost",
            *self.chance,
            pair("parameters", self.before.params, self.after.params),
            pair(f"multiply-adds{without}", self.before.macs, self.after.macs),
            pair("bytes", self.bytes_before, self.bytes_after),
            str(self.bench).splitlines()[0],
            *self.rows,
            *(f"note: {remark}" for remark in self.remarks),
            f"written: {self.output}",
        ]
        return "\n".join(lines)


def pair(what: str, before: int, after: int) -> str:
    """A line of a number before and after, and by what share it changed."""
    return f"{what}: {before:,} -> {after:,} ({after / before - 1:+.1%})" if before else f"{what}: {before} -> {after}"
