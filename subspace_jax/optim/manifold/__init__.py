"""Optimizers of parameters on manifolds."""
