"""Milliseconds of several pieces of work, measured beside each other."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians_ms(
    works: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | None = None,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 60),
) -> dict[str, float]:
    """Median milliseconds of each piece of work.

    The ratios are good even where the times are not, see ``samples_ms``.

    Args:
        works: name -> function to time; it is called at least ``rounds[0] + 2`` times.
        device: where it computes; a GPU is waited for. None: the CPU.
        seconds: time to spend on all of them together; exceeded only by the least rounds.
        rounds: least and most rounds.
    """
    samples = samples_ms(works, device=device, seconds=seconds, rounds=rounds)
    return {name: statistics.median(times) for name, times in samples.items()}


def samples_ms(
    works: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | None = None,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 60),
    between: Callable[[], object] | None = None,
    wall: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each piece of work, one number a round.

    Rounds go through all works in turn, each round from another one on, so that a machine that slows down slows all
    of them alike.

    Args:
        works, device, seconds, rounds: as of ``medians_ms``.
        between: called before each sample and not timed.
        wall: time on the clock, for work that runs on threads of its own; see ``clock``.
    """
    now = time.perf_counter if wall else clock(device)
    repeats = {name: _repeats(work, device, now) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    names, until, (least, most) = list(works), time.perf_counter() + seconds, rounds
    for at in range(most if works else 0):
        if at >= least and time.perf_counter() > until:
            break
        turn = at % len(names)
        for name in (*names[turn:], *names[:turn]):
            if between is not None:
                between()
            samples[name].append(_sample_ms(works[name], repeats[name], device, now))
    return samples


def _repeats(work: Callable[[], object], device: torch.device | None, now: Callable[[], float]) -> int:
    work()  # the first call allocates and compiles
    took = _sample_ms(work, 1, device, now)
    # a sample below a millisecond is mostly the timer and the interpreter: short work is repeated within it
    return max(1, math.ceil(1.0 / max(took, 1e-3)))


def _sample_ms(
    work: Callable[[], object], repeats: int, device: torch.device | None, now: Callable[[], float]
) -> float:
    _wait(device)
    began = now()
    for _ in range(repeats):
        work()
    _wait(device)
    return 1e3 * (now() - began) / repeats


def clock(device: torch.device | None = None) -> Callable[[], float]:
    """One thread's own time where that is all there is: other programs on the same core do not count then."""
    alone = (device is None or device.type == "cpu") and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device | None = None) -> str:
    """The name of the device that times depend on: ``AMD EPYC 9R45, 1 thread`` or ``NVIDIA H200``."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads != 1 else ''}"


def processor() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(named, platform.machine())
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
