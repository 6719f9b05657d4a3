"""Factorized layers: one module per file, each standing in for a dense layer."""
