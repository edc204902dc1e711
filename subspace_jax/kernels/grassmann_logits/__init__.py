"""Lengths of features' projections onto class subspaces, and the cross-entropy of such logits."""

from subspace_jax.kernels.grassmann_logits.api import grassmann_logits
from subspace_jax.kernels.grassmann_logits.cross_entropy import grassmann_cross_entropy

__all__ = ["grassmann_cross_entropy", "grassmann_logits"]
