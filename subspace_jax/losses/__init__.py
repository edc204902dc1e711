"""Loss functions: arrays in, one value for each example out."""

from subspace_jax.losses.classification import cross_entropy

__all__ = ["cross_entropy"]
