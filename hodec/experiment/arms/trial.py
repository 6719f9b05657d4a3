"""One run of a comparison: trained and validated, and tested only where it was chosen."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from hodec._version import __version__
from hodec.errors import ConfigError, MachineError, TrainingError
from hodec.experiment import phases
from hodec.experiment.arms.spec import Candidate
from hodec.experiment.context import RunContext, check_machine
from hodec.experiment.data.images import ImageData
from hodec.experiment.data.loaders import test_loader, val_loader
from hodec.experiment.lit import evaluate, hits
from hodec.experiment.lock import held
from hodec.experiment.loggers import Loggers
from hodec.experiment.pipeline import open_folder, prepare, room, train_nets
from hodec.experiment.run_folder import RunFolder, probe
from hodec.io.atomic import JsonObject, read_json, write_json
from hodec.io.tensors import load_tensors, save_tensors
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

# Which nets of a run are tested: what conversion left, BatchNorm re-estimated, and the end.
TESTED = ("truncated", "compressed")
RESULT, HITS = "trial.json", "hits.safetensors"


@dataclass(frozen=True)
class Trial:
    """What is known of one run.

    Attributes:
        validation: accuracy of the small net on the validation split, 0..1; NaN where training broke down.
        seconds: of its training.
        reduction: ``params`` and ``macs``: share that is saved.
        hits: which test images each of TESTED has right, bool (N,); empty before it is tested.
        error: why training broke down; empty where it did not.
    """

    candidate: Candidate
    seed: int
    validation: float
    seconds: float
    reduction: dict[str, float]
    hits: dict[str, Tensor]
    error: str = ""

    def test(self, net: str = "compressed") -> float:
        """Its test accuracy, 0..1."""
        return float(self.hits[net].double().mean())


def run_trial(
    candidate: Candidate, seed: int, root: Path, data: Callable[[], ImageData], *, test: bool = False
) -> Trial:
    """Train and validate, and test where asked; what has been done before is read.

    Args:
        root: folder of the comparison; the run's own is in it.
        data: reads the images, where they are needed.
        test: read the test split too.

    Raises:
        HodecError: as in ``pipeline.run``; a training that broke down is a result, though.
    """
    path = root / candidate.folder(seed)
    probe(path)
    with room(path), held(path):
        folder = open_folder(candidate.seeded(seed), path)
        facts = read_json(path / RESULT, "result of a trial") if (path / RESULT).exists() else None
        known = facts is not None and (not test or (path / HITS).exists() or facts["validation_accuracy"] is None)
        if not known:
            facts = _compute(candidate, seed, folder, data(), test=test)
    found = load_tensors(path / HITS) if test and (path / HITS).exists() else {}
    return _trial(candidate, seed, cast(JsonObject, facts), found)


def _trial(candidate: Candidate, seed: int, facts: JsonObject, found: dict[str, Tensor]) -> Trial:
    value, seconds = facts["validation_accuracy"], facts["seconds"]
    right = {name: values.bool() for name, values in found.items()}
    accuracy = float("nan") if value is None else value
    return Trial(candidate, seed, accuracy, seconds, facts["reduction"], right, facts.get("error", ""))


def _compute(candidate: Candidate, seed: int, folder: RunFolder, data: ImageData, *, test: bool) -> JsonObject:
    config = candidate.seeded(seed)
    check_machine(config)
    prepare(config)
    folder.check_begun({"data": data.identity(), "hodec": __version__, "torch": torch.__version__})
    run = RunContext(config, data, folder, Loggers(), phases.rank_rule(config, data))
    log.info("%s", folder.path)
    try:
        nets, plan = train_nets(run)
    except MachineError:  # which says nothing of the candidate
        raise
    except TrainingError as error:
        log.warning("%s: %s", folder.path, error)
        facts: JsonObject = {"validation_accuracy": None, "error": str(error), "seconds": 0.0, "reduction": {}}
    else:
        facts = _measured(run, nets, plan, test=test)
    write_json(folder.path / RESULT, facts)
    return facts


def _measured(run: RunContext, nets: dict[str, nn.Module], plan: Plan, *, test: bool) -> JsonObject:
    validation = val_loader(run.data, device=run.device)
    if validation is None:
        raise ConfigError("a comparison chooses on a validation split, give one: data.val_fraction=0.1")
    accuracy = evaluate(nets["compressed"], validation, run.device)
    if test:
        loader = test_loader(run.data, device=run.device)
        right = {name: hits(nets[name], loader, run.device).to(torch.uint8) for name in TESTED}
        save_tensors(run.folder.path / HITS, right)
    seconds = sum(facts.get("seconds", 0.0) for facts in run.folder.phases.values())
    return {"validation_accuracy": accuracy, "seconds": seconds, "reduction": dict(plan.reduction)}
