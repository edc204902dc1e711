"""DoRA's forward pass: the compose step, and the whole linear layer."""

from subspace_jax.kernels.dora_linear.compose import dora_compose
from subspace_jax.kernels.dora_linear.linear import dora_linear

__all__ = ["dora_compose", "dora_linear"]
