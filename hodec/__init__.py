"""hodec: train a network until its layers are low-rank, then swap them for small factorized layers.

``__init__.pyi`` beside this file lists the public names with their homes. Each is imported when it is first asked for:
``import hodec`` alone loads neither torch nor Lightning.
"""

from importlib import import_module
from pathlib import Path

# Each line of the stub is: from HOME import NAME as NAME
_HOMES = {line.split()[-1]: line.split()[1] for line in Path(__file__).with_suffix(".pyi").read_text().splitlines()}

# What `from hodec import *` brings: all but the names that need another package, which is asked for by name.
__all__ = sorted(set(_HOMES) - {"AdmmCallback", "AdmmTrainerCallback"})


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hodec' has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"hodec.{name}") if home == __name__ else getattr(import_module(home), name)
    globals()[name] = value
    return value
