"""Secrets stay out of what a run writes: its settings, its command, its reports and what is uploaded."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hodec.experiment.config.arguments import given

# Names of settings and variables whose values are secret.
SECRET = re.compile(r"(?i)(key|token|secret|passw|credential|auth)")
# Shorter values of variables are no secrets, and would be found in ordinary words; characters.
SHORTEST = 8
HIDDEN = "***"


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
    word = str(redacted(word))
    if not SECRET.search(word):
        return word
    word = re.sub(r"(://[^/:@\s]*):[^@\s]*@", rf"\1:{HIDDEN}@", word)
    return re.sub(rf"([\w.]*{SECRET.pattern[4:]}\w*\s*[=:]\s*)[^,}}\s]+", rf"\1{HIDDEN}", word, flags=re.IGNORECASE)


def _secrets() -> list[str]:
    """Values of the secret variables, the longest first: one may be a part of another."""
    values = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
