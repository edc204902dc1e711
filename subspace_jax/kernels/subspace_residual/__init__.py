"""Squared residuals of rows off a subspace."""

from subspace_jax.kernels.subspace_residual.api import complement_basis, subspace_residual

__all__ = ["complement_basis", "subspace_residual"]
