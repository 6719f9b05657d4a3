"""Optimizers that know which parameters are factors, and of what."""
