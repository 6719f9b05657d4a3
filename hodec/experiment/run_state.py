"""``run.json``: the phases that a run has finished, and what it was begun with; read with care: anybody may edit it."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from hodec.errors import CheckpointError
from hodec.io.atomic import JsonObject, read_json

log = logging.getLogger(__name__)

SHA256 = re.compile(r"[0-9a-f]{64}")

# Phases that leave a net behind.
NETS = ("pretrain", "admm", "dense", "truncated", "retrain")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and bool(SHA256.fullmatch(value))


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_result(value: object) -> bool:
    """Whether these are metrics of which the line of the result can be made."""
    cut = value.get("reduction") if isinstance(value, dict) else None
    nets = [value.get(name) for name in ("dense", "compressed")] if isinstance(value, dict) else [None]
    scored = all(isinstance(net, dict) and _is_number(net.get("test_accuracy")) for net in nets)
    return scored and isinstance(cut, dict) and _are_numbers(cut)


def _is_switch(value: object) -> bool:
    """Whether this says how the dense training ended, see ``SwitchWhenStable.facts``."""
    counts = [value.get("after"), value.get("left")] if isinstance(value, dict) else [""]
    ended = all(type(count) is int and count > 0 for count in counts)
    return ended or counts == [None, 0]


Check = Callable[[object], bool]

# Phase -> what its entry must hold, and what it may.
MUST: dict[str, dict[str, Check]] = {
    "plan": {},
    **{name: {"sha256": _is_digest} for name in NETS},
    "evaluate": {"metrics": _is_result},
    "report": {},
}
MUST["truncated"] = {**MUST["truncated"], "errors": _are_numbers}
MAY: dict[str, Check] = {
    "seconds": _is_number,
    "admm": lambda value: isinstance(value, dict) and isinstance(value.get("status"), str),
    "plan": lambda value: isinstance(value, dict),
    "switch": _is_switch,
    "rate": lambda value: isinstance(value, dict),
    "sha256": _is_digest,
}


def read_state(path: Path) -> tuple[dict[str, JsonObject], JsonObject]:
    """The phases that are done with their facts, and what the run was begun with, empty for older runs.

    Raises:
        CheckpointError: it is damaged, or of hodec 0.1.0.
    """
    state = read_json(path, "state of the run")
    if isinstance(state, dict) and "stages" in state:
        raise CheckpointError(
            f"{path.parent} was begun by hodec 0.1.0, whose unfinished runs this version does not go on with: finish "
            "it there, or give another folder, hydra.run.dir=PATH"
        )
    if not isinstance(state, dict) or not isinstance(state.get("phases"), dict):
        raise CheckpointError(f"{path} is not the state of a run; give another hydra.run.dir=PATH")
    phases, begun = state["phases"], state.get("begun_with", {})
    for phase, facts in phases.items():
        if fault := _fault(phase, facts):
            raise CheckpointError(
                f"{path}: {fault}: it was altered. Restore it, remove its entry {phase!r} to compute that phase again, "
                "or give another hydra.run.dir=PATH"
            )
    return phases, begun if isinstance(begun, dict) else {}


def _fault(phase: str, facts: object) -> str:
    """What is wrong with the entry of a phase, or an empty text."""
    if phase not in MUST:
        return f"there is no phase {phase!r}"
    if not isinstance(facts, dict):
        return f"phase {phase} has no facts"
    checks = {**{key: check for key, check in MAY.items() if key in facts}, **MUST[phase]}
    wrong = [key for key, is_right in checks.items() if not is_right(facts.get(key))]
    return f"phase {phase} has no {wrong[0]} that could be read" if wrong else ""


def check_begun(path: Path, stored: Mapping[str, object], mine: Mapping[str, object]) -> None:
    """Compare what a run was begun with to what it goes on with; other versions are said, as last digits may differ.

    Raises:
        CheckpointError: the images are split in another way.
    """
    differ = [key for key in mine if key in stored and stored[key] != mine[key]]
    if "data" in differ:
        raise CheckpointError(
            f"{path} was begun with other images (then {stored['data']}, now {mine['data']}): their files or their "
            "order have changed. Restore them, or start anew in another folder, hydra.run.dir=PATH"
        )
    for key in differ:
        log.warning(
            "this run was begun with %s %s and goes on with %s: last digits may differ", key, stored[key], mine[key]
        )
