"""Train, convert, retrain and report: ``python train.py [group=option] [key=value]``, see ``--help``."""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hodec.config import to_config
from hodec.config_check import check_overrides
from hodec.errors import HodecError

log = logging.getLogger("hodec")
started: list[str] = []  # folders of the jobs that came so far as to run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run one job and return the accuracy of the compressed net, 0..1, for sweepers to maximise."""
    job = HydraConfig.get()
    started.append(job.runtime.output_dir)
    try:
        from hodec.pipeline import run  # here: mistakes in the settings show before torch is imported

        result = run(to_config(cfg), Path(job.runtime.output_dir))
    except Exception as error:
        known = isinstance(error, HodecError)
        log.error("%s: %s", type(error).__name__, error, exc_info=not known)
        if job.mode is RunMode.MULTIRUN:
            raise  # this job has failed; the others of the sweep go on
        sys.exit(2 if known else 1)
    return float(result["compressed"]["test_accuracy"])


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the lines below as they are
    try:
        check_overrides(sys.argv[1:], Path(__file__).resolve().parent / "conf")
        main()
    except HodecError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if started:
            raise  # a job of a sweep; otherwise Hydra could not make the folder for the first one
        text = f"ConfigError: the run folder cannot be written ({error}); give another: hydra.run.dir=PATH"
        print(text, file=sys.stderr)
        sys.exit(2)
