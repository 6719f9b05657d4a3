"""How far a long evaluation is: a bar on a terminal, log lines elsewhere."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Tell = Callable[[str], None]


@contextmanager
def progress_of(total: int, log: logging.Logger, *, shown: bool = True) -> Iterator[Tell]:
    """A function to call after each step with what was done.

    Args:
        total: number of steps.
        log: takes a line a step where there is no bar.
        shown: False never draws a bar.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        done = 0

        def line(text: str) -> None:
            nonlocal done
            done += 1
            log.info("%d/%d %s", done, total, text)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text, refresh=True)
