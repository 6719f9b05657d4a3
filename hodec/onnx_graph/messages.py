"""Settings of ``decompose_file`` in messages."""

import shlex

from hodec.errors import Use


def exclude_use(name: str) -> Use:
    """The setting that leaves a node dense."""
    return Use("exclude", [name], f"--exclude {shlex.quote(name)}")


def literal(text: str) -> str:
    """``text`` within the message of an error that names settings, where braces mean something."""
    return text.replace("{", "{{").replace("}", "}}")
