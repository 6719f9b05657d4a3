"""The Hydra callback that writes the report of a multirun when its last run is over."""

import atexit
import logging
from contextlib import ExitStack
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hodec.experiment.signals import stoppable

log = logging.getLogger(__name__)

_signals = ExitStack()  # of the program, and not of the callback, which parallel launchers send to their workers


class SweepReport(Callback):
    """Named in the config as ``hydra.callbacks.sweep_report._target_: hodec.experiment.report.sweep.SweepReport``.

    Hydra calls ``on_multirun_end`` only when *no* run failed. A sweep with failed or interrupted runs needs its
    report most, so it is written when the program ends.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Remember the folder, absolute: a run may change the working directory."""
        try:
            # matplotlib is loaded now: torch cannot be imported any more when the program ends, and a single run
            # does without
            import hodec.experiment.report.render  # noqa: F401

            self._folder = Path(config.hydra.sweep.dir).resolve()
        except Exception as error:
            log.warning("no sweep report: %s (%s)", error, type(error).__name__)
        else:
            atexit.register(self._at_exit)
            # A launcher that waits for its workers would die of SIGTERM at once, and without a report.
            _signals.enter_context(stoppable())

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Write the sweep report; a failure to do so is a warning, as the runs themselves are done."""
        atexit.unregister(self._at_exit)
        _signals.close()
        try:
            from hodec.experiment.report.render import write_sweep

            log.info("sweep report: %s", write_sweep(self._folder or Path(config.hydra.sweep.dir)))
        except Exception as error:
            log.warning("no sweep report: %s (%s)", error, type(error).__name__)

    def _at_exit(self) -> None:
        """Write the report of a sweep that did not end well, if it came as far as a run."""
        if self._folder and self._folder.is_dir() and any(child.is_dir() for child in self._folder.iterdir()):
            self.on_multirun_end(DictConfig({}))
