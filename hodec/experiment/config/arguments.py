"""The command line of a program, also in the processes that a launcher starts by another one."""

import json
import os
import sys

VARIABLE = "HODEC_ARGV"


def remember() -> None:
    """Hand this process's command line to those that it starts."""
    os.environ[VARIABLE] = json.dumps({"pid": os.getpid(), "argv": sys.argv})


def given() -> list[str]:
    """The command line that the user wrote: of this process, or of the one that started it as a worker."""
    stored = json.loads(os.environ.get(VARIABLE, "{}"))
    return list(sys.argv if stored.get("pid", os.getpid()) == os.getpid() else stored["argv"])
