"""What hodec decompose and compress say: one line, and the figures behind it, each measured on the written file."""

from collections.abc import Mapping
from dataclasses import dataclass

from hodec.cost.count import Cost
from hodec.onnx_graph.bench import Bench
from hodec.onnx_graph.changes import Change, shortened
from hodec.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file whose layers were decomposed.

    Attributes:
        changes: node -> what became of it.
        before, after: cost of one image, counted in the graphs themselves; what replaced a node by itself.
        of_one: of which part of a call the multiply-adds are, in words; empty for a call of one image.
        uncounted: names of nodes whose multiply-adds are in neither count, as they are not known.
        bytes_before, bytes_after: size of the files, data files among them.
        remarks: what else was done, or could not be checked, and why.
    """

    plan: Plan
    changes: Mapping[str, Change]
    before: Cost
    after: Cost
    uncounted: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    remarks: tuple[str, ...] = ()
    of_one: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "changes": {name: change.to_dict() for name, change in self.changes.items()},
            "skipped": dict(self.plan.skipped),
            "params": [self.before.params, self.after.params],
            "macs": [self.before.macs, self.after.macs],
            "uncounted": list(self.uncounted),
            "bytes": [self.bytes_before, self.bytes_after],
            "remarks": list(self.remarks),
        }

    def costs(self) -> list[str]:
        """Parameters, multiply-adds and bytes, a line each: before, after, and by what share they changed."""
        names = ", ".join(map(shortened, self.uncounted))
        without = f" without {names}, which cannot be counted" if names else ""
        pairs = {
            "parameters": (self.before.params, self.after.params),
            f"multiply-adds{self.of_one}{without}": (self.before.macs, self.after.macs),
            "bytes": (self.bytes_before, self.bytes_after),
        }
        return [
            f"{what}: {before:,} -> {after:,}" + (f" ({after / before - 1:+.1%})" if before else "")
            for what, (before, after) in pairs.items()
        ]


@dataclass(frozen=True, kw_only=True)
class Compressed(Written):
    """A file that was compressed.

    Attributes:
        judge: what the score is.
        dense, score: of the dense file and of the written one, on held-out data.
        allowed: how much the score might drop, in its own unit.
        chance: what the loss says of other inputs, in sentences.
        scale, unit: how scores are printed.
        samples: that were fitted to, and that were held out.
        words: what the data were made from.
        bench: latency of both files.
        threads: of onnxruntime while searching.
        layers: that could be decomposed.
        rows: the table of files in float and in 8 bits, where that was asked for.
    """

    output: str
    judge: str
    dense: float
    score: float
    allowed: float
    scale: float
    unit: str
    samples: tuple[int, int]
    words: str
    bench: Bench
    threads: int
    layers: int
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
        return super().to_dict() | {
            "output": self.output,
            "verdict": self.verdict,
            "judge": self.judge,
            "score": [self.dense, self.score],
            "allowed": self.allowed,
            "chance": list(self.chance),
            "samples": list(self.samples),
            "data": self.words,
            "latency": self.bench.to_dict(),
            "threads": self.threads,
            "rows": list(self.rows),
        }

    def __str__(self) -> str:
        fit, held = self.samples
        lines = [
            self.verdict,
            f"data: {self.words}; fitted to {fit} samples, judged by {held} that were held out",
            f"score: {self.judge}; {self.allowed * self.scale:.3g}{self.unit} may be lost",
            *self.chance,
            *self.costs(),
            str(self.bench).splitlines()[0],
            *self.rows,
            *(f"note: {remark}" for remark in self.remarks),
            f"written: {self.output}",
        ]
        return "\n".join(lines)
