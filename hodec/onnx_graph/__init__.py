"""A model file in, a smaller model file out: no Python class of the model, no training code."""
