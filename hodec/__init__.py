"""hodec: train a network until its layers are low-rank, then swap them for small factorized layers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hodec.errors import HodecError

if TYPE_CHECKING:
    from hodec import formats, ranks
    from hodec.admm.callback import AdmmCallback
    from hodec.conversion import convert
    from hodec.export.checkpoint import load, save
    from hodec.export.fuse import fuse
    from hodec.export.onnx import to_onnx
    from hodec.export.program import to_program
    from hodec.methods import METHODS
    from hodec.metric import collect_metrics
    from hodec.plan import LayerPlan, Plan
    from hodec.ranks import make_plan

__version__ = "0.1.0"

# Loaded when first asked for: `import hodec` alone brings neither torch nor Lightning.
_HOMES = {
    "AdmmCallback": "hodec.admm.callback",
    "LayerPlan": "hodec.plan",
    "METHODS": "hodec.methods",
    "Plan": "hodec.plan",
    "collect_metrics": "hodec.metric",
    "convert": "hodec.conversion",
    "fuse": "hodec.export.fuse",
    "load": "hodec.export.checkpoint",
    "make_plan": "hodec.ranks",
    "save": "hodec.export.checkpoint",
    "to_onnx": "hodec.export.onnx",
    "to_program": "hodec.export.program",
}
_MODULES = ("formats", "ranks")

__all__ = [
    "METHODS",
    "AdmmCallback",
    "HodecError",
    "LayerPlan",
    "Plan",
    "__version__",
    "collect_metrics",
    "convert",
    "formats",
    "fuse",
    "load",
    "make_plan",
    "ranks",
    "save",
    "to_onnx",
    "to_program",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"hodec.{name}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hodec' has no attribute {name!r}")
