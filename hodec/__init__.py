"""hodec: train a network until its layers are low-rank, then swap them for small factorized layers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hodec._version import __version__
from hodec.errors import HodecError

if TYPE_CHECKING:
    from hodec import formats, ranks
    from hodec.admm.callback import AdmmCallback
    from hodec.calibration.input_covariance import collect_covariances
    from hodec.conversion.swap import convert
    from hodec.export.checkpoint import load, save
    from hodec.export.onnx import to_onnx
    from hodec.export.program import to_program
    from hodec.fusion.search import fuse
    from hodec.methods import METHODS
    from hodec.plan.layer import LayerPlan
    from hodec.plan.plan import Plan
    from hodec.ranks import make_plan

# Loaded when first asked for: `import hodec` alone brings neither torch nor Lightning.
_HOMES = {
    "AdmmCallback": "hodec.admm.callback",
    "LayerPlan": "hodec.plan.layer",
    "METHODS": "hodec.methods",
    "Plan": "hodec.plan.plan",
    "collect_covariances": "hodec.calibration.input_covariance",
    "convert": "hodec.conversion.swap",
    "fuse": "hodec.fusion.search",
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
    "collect_covariances",
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
