"""One step on a Grassmann manifold."""

from subspace_jax.kernels.grassmann_step.api import grassmann_step

__all__ = ["grassmann_step"]
