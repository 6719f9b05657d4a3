"""One piece of work in a process of its own, with its seconds and its peak memory.

    python -m benchmarks.child MODULE:FUNCTION '{"argument": 1}'

The function is called once; what it returns (plain values) comes back with what was measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import THREAD_VARIABLES
from benchmarks.rows import Row, Target, in_unit

_STATUS = Path("/proc/self/status")
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """What a child process measured.

    Attributes:
        seconds: CPU seconds of the work, all threads.
        startup: CPU seconds before it, imports most of all.
        wall: seconds on the clock, from starting the process to its end.
        peak: bytes, most of resident memory that the whole process ever had.
        before: bytes of resident memory when torch, hodec and the module of the work had been imported.
        value: what the function returned.
        problem: why there is nothing of that; empty when it worked.
    """

    seconds: float = 0.0
    startup: float = 0.0
    wall: float = 0.0
    peak: int = 0
    before: int = 0
    value: Any = None
    problem: str = ""


def in_child(work: str, *, limit: float = 600.0, threads: int | None = None, **arguments: Any) -> Outcome:
    """Call ``module:function`` with these arguments in a new process of this Python.

    Args:
        work: where the function is.
        limit: seconds after which it is ended.
        threads: of each library; by default as many as here.
    """
    command = [sys.executable, "-m", "benchmarks.child", work, json.dumps(arguments)]
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    pinned = dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}
    env = {**_with_bytecode(os.environ), **pinned, "PYTHONPATH": path}
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(problem=f"it took longer than {limit:.0f} s")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return Outcome(problem=f"the process ended with {done.returncode} ({last})")
    return Outcome(wall=time.perf_counter() - began, **json.loads(done.stdout.splitlines()[-1]))


def _with_bytecode(environment: Mapping[str, str]) -> dict[str, str]:
    """Where Python may write no bytecode, each start would compile a thousand modules that an installation has."""
    env = dict(environment)
    if env.pop("PYTHONDONTWRITEBYTECODE", None):
        env.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "hodec-benchmarks-bytecode"))
    return env


def peak_row(group: str, what: str, done: Outcome, target: Target | None, more: str = "") -> Row:
    """The row of a child's peak memory."""
    above, before = (in_unit(value, "B") for value in (done.peak - done.before, done.before))
    return Row(
        group,
        f"{what}: peak memory of the process",
        ours=done.peak,
        unit="B",
        figure=done.peak,
        figure_unit="B",
        target=target,
        note=f"{above} above what importing torch and hodec takes ({before}){more}",
    )


def resident(key: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most so far).

    Read from the process's own status: what ``getrusage`` calls the most includes the parent's memory at the moment
    it started this process. Elsewhere than on Linux there is only that.
    """
    try:
        found = next(text for text in _STATUS.read_text().splitlines() if text.startswith(key))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def main(work: str, arguments: str) -> None:
    """Call the function, print one line of JSON."""
    import torch

    import hodec  # noqa: F401  (what it takes is reported apart)

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, _, function = work.partition(":")
    call = getattr(import_module(module), function)
    before, began = resident("VmRSS"), time.process_time()
    given: Mapping[str, Any] = json.loads(arguments)
    value = call(**given)
    seconds = time.process_time() - began
    found = {"seconds": seconds, "startup": began, "peak": resident("VmHWM"), "before": before, "value": value}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
