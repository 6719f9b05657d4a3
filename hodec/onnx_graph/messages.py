"""Settings of ``decompose_file`` in messages, where flags are not spelled as arguments are."""

from hodec.errors import Use


class Words(Use):
    """A setting with its words in Python and on the command line: ``force=True`` and ``--force``."""

    def __init__(self, python: str, flags: str) -> None:
        super().__init__(python, flags)

    def in_python(self) -> str:
        return self.setting

    def in_hydra(self) -> str:
        return self.setting

    def in_flags(self) -> str:
        return str(self.value)


def exclude_use(name: str) -> Use:
    """The setting that leaves a node dense."""
    return Words(f"exclude=[{name!r}]", f"--exclude {name}")


def literal(text: str) -> str:
    """``text`` within the message of an error that names settings, where braces mean something."""
    return text.replace("{", "{{").replace("}", "}}")
