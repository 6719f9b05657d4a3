"""Tensor formats: mathematics of tensors only, no modules, no files."""

from hodec.formats import modes, tt, tt_classical

__all__ = ["modes", "tt", "tt_classical"]
