"""Tensor formats: mathematics of tensors only, no modules, no files."""

from hodec.formats import modes, svd, tt, tt_classical, tucker

__all__ = ["modes", "svd", "tt", "tt_classical", "tucker"]
