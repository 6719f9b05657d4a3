"""Secrets stay out of what a run writes: its settings, its command, its reports and what is uploaded."""

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.conf import HydraConf
from hydra.types import RunMode

from hodec.experiment.config.arguments import given
from hodec.io.atomic import write_text

# Names of settings and variables whose values are secret.
SECRET = re.compile(r"(?i)(key|token|secret|passw|credential|auth)")
# Characters: shorter values of variables would be found in ordinary words, and NIST SP 800-63B, 5.1.1.1, asks for 8.
SHORTEST = 8
HIDDEN = "***"
# The password in an address.
ADDRESS = re.compile(r"(://[^/:@\s]*):[^@\s]*@")
# Parts of Hydra's record that are texts for people, in which ``key=value`` is no secret.
NO_SETTINGS = ("help", "hydra_help")


def redacted(value: object) -> object:
    """Plain values in which the values of secret variables of the environment are hidden."""
    if isinstance(value, str):
        for secret in _secrets():
            value = value.replace(secret, HIDDEN)
        return value
    if isinstance(value, dict):
        return {key: redacted(one) for key, one in value.items()}
    return [redacted(one) for one in value] if isinstance(value, list | tuple) else value


def command(arguments: Sequence[str] | None = None) -> str:
    """The command line of this program as a shell reads it, secrets hidden; by default with its own arguments."""
    own = given()
    script = Path(own[0])
    program = ["hodec", "train"] if script.parts[-2:] == ("experiment", "__main__.py") else ["python", script.name]
    words = [_without_secret(word) for word in (own[1:] if arguments is None else arguments)]
    return shlex.join([*program, *words])


def _without_secret(word: str) -> str:
    """An argument without its secret: one named so, one within a mapping, or the value of a secret variable."""
    word = ADDRESS.sub(rf"\1:{HIDDEN}@", str(redacted(word)))
    if not SECRET.search(word):
        return word
    named = rf"([\w.]*{SECRET.pattern[4:]}\w*\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^,}}\s]+)"
    return re.sub(named, rf"\1{HIDDEN}", word, flags=re.IGNORECASE)


def clean_record(job: HydraConf) -> None:
    """Hide secrets in what Hydra has noted of a job and of its sweep: their settings and arguments.

    What is no readable record is left as it is.
    """
    subdir, names = job.output_subdir, ("config.yaml", "hydra.yaml", "overrides.yaml")
    paths = [Path(job.runtime.output_dir, subdir, name) for name in names] if subdir else []
    if job.mode is RunMode.MULTIRUN:
        paths.append(Path(job.sweep.dir, "multirun.yaml"))
    for path in paths:
        with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
            record = yaml.safe_load(path.read_text(encoding="utf-8"))
            cleaned = _without_secrets(record)
            if cleaned != record:
                write_text(path, yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True))


def _without_secrets(record: object) -> object:
    """Plain values without those that their names say are secret, and without those in arguments, ``KEY=VALUE``."""
    if isinstance(record, dict):
        return {
            key: HIDDEN
            if SECRET.search(str(key)) and isinstance(one, str | float | int) and not isinstance(one, bool)
            else one
            if key in NO_SETTINGS
            else _without_secrets(one)
            for key, one in record.items()
        }
    if isinstance(record, list):
        return [_without_secrets(one) for one in record]
    if isinstance(record, str):
        return _without_secret(record) if "=" in record else ADDRESS.sub(rf"\1:{HIDDEN}@", str(redacted(record)))
    return record


def _secrets() -> list[str]:
    """Values of the secret variables, the longest first: one may be a part of another."""
    values = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
