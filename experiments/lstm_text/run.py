"""A character-level LSTM whose recurrent weights become tensor trains with > 100 times fewer numbers.

    python experiments/lstm_text/run.py [--rows ROWS.jsonl] [--small]

A run that has its row is not done again, and nets are kept in ``outputs/`` beside the rows. README.md has the protocol.
"""

import argparse
import hashlib
import json
import math
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hodec
from hodec.layers.base import randomize_factors


@dataclass(frozen=True)
class Setup:
    """Sizes; ``steps`` is the budget of the dense start and, once more, of each arm that begins there."""

    steps: int = 2000
    batch: int = 16
    length: int = 48
    embedding: int = 64
    hidden: int = 192
    n_modes: int = 4
    rank: int = 4
    update_every: str = "25steps"
    seeds: tuple[int, ...] = (0, 1, 2)
    characters: int | None = None  # how much of the text; None: all of it


SMALL = Setup(4, 4, 8, 16, 16, n_modes=2, rank=1, update_every="1steps", seeds=(0, 1), characters=2000)

# Learning rates tried with seed 0. While the best of three or four is at an end, one beyond it is tried too.
RATES = {
    "start": (1e-3, 3e-3, 1e-2),
    "cut": (0.0,),
    "half": (
        1e-3,
        3e-3,
        1e-2,
    ),  # judged after the retraining, at the rate that is best behind ADMM at the first of these
    **dict.fromkeys(("admm", "direct", "random", "scratch"), (1e-2, 3e-2, 9e-2)),
    "dense": (3e-4, 1e-3, 3e-3),
}


class Run(NamedTuple):
    """One run; ``admm_rate`` is the learning rate of the ADMM that comes before the retraining of arm ``admm``."""

    arm: str
    seed: int
    rate: float
    admm_rate: float | None = None

    @property
    def name(self) -> str:
        """Its name in the rows and among the states."""
        return "_".join(f"{part:g}" if isinstance(part, float) else str(part) for part in self if part is not None)


def read_text() -> str:
    """The topics of pydoc in alphabetical order, each paragraph once: several topics hold the text of others."""
    parts = (part for _, topic in sorted(pydoc_data.topics.topics.items()) for part in re.split(r"\n\s*\n", topic))
    once: dict[str, str] = {}
    for part in parts:
        once.setdefault(" ".join(part.split()), part.strip("\n"))
    return "\n\n".join(once.values())


class Net(nn.Module):
    """Logits of the next character, (batch, steps) -> (batch, steps, characters)."""

    def __init__(self, characters: int, setup: Setup) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, setup.embedding)
        self.lstm = nn.LSTM(setup.embedding, setup.hidden, batch_first=True)
        self.head = nn.Linear(setup.hidden, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def bits(net: nn.Module, text: Tensor) -> float:
    """Bits per character of a text, read in sixteen pieces at once, each from a state of zero."""
    rows = text[: len(text) // 16 * 16].view(16, -1)
    with torch.no_grad():
        logits = net.eval()(rows[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).nan_to_num(math.inf)) / math.log(2)


class Experiment:
    """The text, the rows so far, and how each run is trained."""

    def __init__(self, setup: Setup, rows: Path) -> None:
        self.setup, self.rows_file, self.states = setup, rows, rows.parent / "outputs"
        self.states.mkdir(exist_ok=True)
        self.sha256 = hashlib.sha256((text := read_text()).encode()).hexdigest()
        alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([alphabet[c] for c in text[: setup.characters]])
        tenth, self.alphabet = len(ids) // 10, len(alphabet)
        self.train, self.validation, self.test = ids[: -2 * tenth], ids[-2 * tenth : -tenth], ids[-tenth:]
        rows.touch()
        self.rows = {row["run"]: row for row in map(json.loads, rows.read_text().splitlines())}

    def fresh(self, seed: int) -> Net:
        """An untrained dense net."""
        torch.manual_seed(seed)
        return Net(self.alphabet, self.setup)

    def plan(self, net: nn.Module) -> hodec.Plan:
        """Every rank of both weights of the LSTM at most ``setup.rank``."""
        setup, x = self.setup, self.train[None, : self.setup.length]
        return hodec.make_plan(net, setup.rank, method="tt", n_modes=setup.n_modes, include="lstm.*", example_input=x)

    def trained(self, run: Run) -> nn.Module:
        """The net at the end of a run, which is done now if it has no row."""
        self.do(run)
        net = self.fresh(run.seed)
        net = net if run.arm in ("start", "dense") else hodec.convert(net, self.plan(net))
        net.load_state_dict(torch.load(self.states / f"{run.name}.pt"))
        return net

    def crops(self, seed: int, steps: range) -> Iterator[Tensor]:
        """Random pieces of the training text, (batch, length + 1) a step; those of a step are the same in all arms."""
        setup, random = self.setup, torch.Generator().manual_seed(seed)
        first = torch.randint(len(self.train) - setup.length, (2 * setup.steps, setup.batch), generator=random)
        yield from (self.train[first[step, :, None] + torch.arange(setup.length + 1)] for step in steps)

    def fit(self, net: nn.Module, run: Run, steps: range, plan: hodec.Plan | None = None) -> hodec.Admm | None:
        """Train by Adam, whose rate falls in a line to a twentieth; with a plan under ADMM."""
        begin, optimizer = time.perf_counter(), torch.optim.Adam(net.parameters(), run.rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(steps))
        admm = plan and hodec.Admm(net, plan, optimizer, update_every=self.setup.update_every, clipped=True)
        net.train()
        for crop in self.crops(run.seed, steps):
            optimizer.zero_grad()
            F.cross_entropy(net(crop[:, :-1]).flatten(0, 1), crop[:, 1:].flatten()).backward()
            if admm:
                admm.before_step()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if admm:
                admm.after_step()
            schedule.step()
        self.seconds = round(time.perf_counter() - begin, 1)
        return admm

    def arm(self, run: Run) -> tuple[nn.Module, dict[str, float]]:
        """The net at the end of a run, and what else its row holds."""
        n = self.setup.steps
        steps = {"start": range(n), "half": range(n, n + n // 2), "admm": range(n + n // 2, 2 * n), "cut": range(0)}
        new, half = run.arm in ("start", "scratch"), Run("half", run.seed, run.admm_rate or 0.0)
        before = half if run.arm == "admm" else None if new else self.best("start", run.seed)
        net = self.fresh(run.seed) if before is None else self.trained(before)
        if run.arm == "half":
            admm = self.fit(net, run, steps["half"], self.plan(net))
            return admm.convert(), {"untruncated": bits(net, self.validation), "residual": admm.primal[-1]}
        if run.arm in ("cut", "direct", "random", "scratch"):
            net = hodec.convert(net, self.plan(net))
        if run.arm in ("random", "scratch"):
            randomize_factors(net, seed=run.seed)
        self.fit(net, run, steps.get(run.arm, range(0 if run.arm == "scratch" else n, 2 * n)))
        return net, {}

    def do(self, run: Run) -> float:
        """The validation figure of a run, which is trained unless it has a row."""
        if run.name not in self.rows:
            net, more = self.arm(run)
            torch.save(net.state_dict(), self.states / f"{run.name}.pt")
            weights = sum(w.numel() for name, w in net.lstm.named_parameters() if "bias" not in name)
            parameters = sum(w.numel() for w in net.parameters())
            sizes = {"parameters": parameters, "recurrent": weights, "seconds": self.seconds}
            self.write({"run": run.name, **run._asdict(), "validation": bits(net, self.validation), **more, **sizes})
        return float(self.rows[run.name]["validation"])

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the file."""
        self.rows[row["run"]] = row
        with self.rows_file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def best(self, arm: str, seed: int) -> Run:
        """The run of an arm at the learning rates that are best on the validation text with seed 0."""
        name = "admm" if arm == "half" else arm
        first = RATES["half"][0] if name == "admm" else None
        best = self.best_of([Run(name, 0, rate, first) for rate in RATES[name]], "rate")
        if first is not None:
            best = self.best_of([best._replace(admm_rate=rate) for rate in RATES["half"]], "admm_rate")
        return Run("half", seed, best.admm_rate) if arm == "half" else best._replace(seed=seed)

    def best_of(self, runs: list[Run], field: str) -> Run:
        """The best run; while that of three or four is at an end, one beyond it is tried too."""
        best, values = min(runs, key=self.do), [getattr(run, field) for run in runs]
        value = getattr(best, field)
        beyond = {min(values): value / 3, max(values): value * 3}.get(value)
        if beyond is None or not 3 <= len(runs) < 5:
            return best
        return self.best_of([*runs, best._replace(**{field: beyond})], field)

    def read_test(self, run: Run) -> float:
        """Bits per character of the test text."""
        name = f"test_{run.name}"
        if name not in self.rows:
            self.write({"run": name, "test": bits(self.trained(run), self.test), "text": self.sha256})
        return float(self.rows[name]["test"])

    def table(self) -> str:
        """One line an arm, figures of the test text; ``half`` is the factorized net right after ADMM."""
        runs = {arm: [self.best(arm, seed) for seed in self.setup.seeds] for arm in RATES}
        for run in sum(runs.values(), []):  # all of validation before the first look at the test text
            self.do(run)
        lines = ["| run | rate | validation | test | seeds | recurrent weights | all | seconds |", "|---" * 8 + "|"]
        for arm, ones in runs.items():
            rows, tests = [self.rows[run.name] for run in ones], [self.read_test(run) for run in ones]
            validation, seconds = (mean(row[key] for row in rows) for key in ("validation", "seconds"))
            line = f"| {arm} | {ones[0].rate:g} | {validation:.3f} | {mean(tests):.3f} | "
            line += " / ".join(f"{one:.3f}" for one in tests)
            lines.append(f"{line} | {rows[0]['recurrent']:,} | {rows[0]['parameters']:,} | {seconds:.0f} |")
        return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what has no row yet and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "rows.jsonl")
    parser.add_argument("--small", action="store_true", help="a few steps of a tiny net, into files of its own")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sys.stdout.write(Experiment(SMALL if given.small else Setup(), given.rows).table())


if __name__ == "__main__":
    main()
