"""The results of a run: cost, accuracy and latency of its nets, and what they were computed with."""

import logging
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict

import pytorch_lightning
import torch
from torch import Tensor, nn

from hodec._version import __version__
from hodec.conversion.swap import planned_spectra
from hodec.cost.count import count_cost
from hodec.cost.timing import device_name, medians_ms
from hodec.errors import HodecError
from hodec.experiment.context import RunContext
from hodec.experiment.data.loaders import test_loader, val_loader
from hodec.experiment.lit import evaluate, hits
from hodec.experiment.redaction import command
from hodec.export import checkpoint
from hodec.fusion.search import fuse
from hodec.io.atomic import JsonObject
from hodec.layers.plain import copied
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)


def measure(run: RunContext, nets: Mapping[str, nn.Module]) -> JsonObject:
    """Return what ``metrics.json`` holds; this is the only place that reads the test set.

    Args:
        nets: ``dense``, ``truncated`` and ``compressed``, and ``teacher`` and ``pretrained`` where there are such nets.
    """
    loader, validation = test_loader(run.data, device=run.device), val_loader(run.data, device=run.device)
    metrics: JsonObject = {}
    right: dict[str, Tensor] = {}
    for name, net in nets.items():
        cost = count_cost(net.cpu(), run.example)
        right[name] = hits(net, loader, run.device)
        metrics[name] = {"test_accuracy": int(right[name].sum()) / len(right[name]), **asdict(cost)}
        if validation is not None:
            metrics[name]["validation_accuracy"] = evaluate(net, validation, run.device)
        net.cpu()
    # Conversion has changed no other buffers than BatchNorm's, which it has estimated anew.
    raw = copied(nets["truncated"])
    raw.load_state_dict(dict(nets["dense"].named_buffers()), strict=False)
    metrics["truncated"]["test_accuracy_raw"] = evaluate(raw, loader, run.device)
    dense, compressed, phases = metrics["dense"], metrics["compressed"], run.folder.phases
    metrics["reduction"] = {key: 1 - compressed[key] / dense[key] for key in ("params", "macs")}
    if run.folder.writes:  # of several processes, one has the machine for itself
        for name, ms in latency({name: nets[name] for name in ("dense", "compressed")}, run).items():
            metrics[name]["latency_ms"] = ms
            metrics["latency"] = {"batch": 1, "device": device_name(run.device)}
    others = [name for name in ("pretrained", "dense") if name in right]
    return metrics | {
        "against": {name: changed(right[name], right["compressed"]) for name in others},
        "admm": phases.get("admm", {}).get("admm", {"status": "off", "primal_residual": None}),
        **{key: value for key, value in phases.get("dense", {}).items() if key == "switch"},
        "conversion": phases["truncated"]["errors"],
        "retraining": phases.get("retrain", {}).get("rate", {}),
        "seconds": {name: facts["seconds"] for name, facts in phases.items() if "seconds" in facts},
        "data": {"name": run.config.data.name, "classes": run.data.num_classes, "images": run.data.split_sizes()},
        "model": {"name": getattr(run.config.model, "_target_", run.config.model.name)},
        "weights_sha256": checkpoint.weights_digest(nets["compressed"]),
        "seed": run.config.seed,
        "versions": versions(),
        "command": command(),
    }


def spectra(dense: nn.Module, plan: Plan, *, most: int = 48) -> JsonObject:
    """Return what ``spectra.json`` holds: of each planned layer the singular values that its ranks cut, before the cut.

    They are shares of the largest, ``values``, at places counted from 1, ``at``: all of them, or of more than ``most``
    every so many, closest at the front, and those beside the cut. ``rank`` of the ``full`` ones are kept.
    """
    found: JsonObject = {}
    for name, each in planned_spectra(dense, plan).items():
        found[name] = []
        for position, values in each:
            full, kept = len(values), min(plan[name].ranks[position], len(values))
            at = torch.arange(1, full + 1)
            if full > most:
                sparse = torch.logspace(0, math.log10(full), most).round().long()
                at = torch.cat([sparse, torch.tensor([kept, kept + 1])]).clamp(1, full).unique()
            shares = (values / values[0].clamp_min(1e-30))[at - 1].tolist()
            found[name].append(
                {"rank": kept, "full": full, "at": at.tolist(), "values": [float(f"{x:.4g}") for x in shares]}
            )
    return found


def changed(before: Tensor, after: Tensor) -> dict[str, int]:
    """Count the images that one net classifies rightly and the other does not: those ``lost`` and those ``won``.

    Args:
        before, after: which images each net classifies rightly, bool (N,).
    """
    return {"lost": int((before & ~after).sum()), "won": int((~before & after).sum())}


def latency(nets: Mapping[str, nn.Module], run: RunContext, *, seconds: float = 1.0) -> dict[str, float]:
    """Return the median milliseconds of each net for one image, timed in turns for ``seconds`` in all.

    All nets are fused alike: batch norms are folded, factorized layers take the form of fewest MACs, and the memory
    order is channels-last. Weights and random state stay as they are. Where a net cannot be fused, there is a warning
    and no result.
    """
    x = torch.randn(run.example.shape, generator=torch.Generator().manual_seed(0))
    x = x.to(run.device, memory_format=torch.channels_last)
    fused = {}
    try:
        for name, net in nets.items():
            placed = copied(net).to(run.device)
            fused[name] = fuse(placed, example_input=x, target="macs", memory_format="channels_last")
    except HodecError as error:
        log.warning("latency is not measured: %s", error)
        return {}
    with torch.inference_mode():
        works = {name: lambda net=net: net(x) for name, net in fused.items()}
        return medians_ms(works, device=run.device, seconds=seconds)


def versions() -> JsonObject:
    """Return what this run was computed with; other thread counts and versions give other last digits."""
    return {
        "hodec": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch-lightning": pytorch_lightning.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def summary(metrics: JsonObject) -> str:
    """Return the result in one line."""
    cut = metrics["reduction"]
    nets = [name for name in ("pretrained", "dense", "truncated", "compressed") if name in metrics]
    scores = ", ".join(f"{name} {metrics[name]['test_accuracy']:.2%}" for name in nets)
    return f"{cut['params']:.1%} fewer parameters, {cut['macs']:.1%} fewer MACs; test accuracy: {scores}"
