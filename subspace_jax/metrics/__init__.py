"""Measures of what a model has learnt: arrays in, numbers out."""

from subspace_jax.metrics.class_structure import class_separation_r2, intra_class_variability

__all__ = ["class_separation_r2", "intra_class_variability"]
