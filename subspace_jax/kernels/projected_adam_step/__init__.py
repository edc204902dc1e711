"""One Adam step within a subspace of a weight's rows or columns."""

from subspace_jax.kernels.projected_adam_step.api import projected_adam_step

__all__ = ["projected_adam_step"]
