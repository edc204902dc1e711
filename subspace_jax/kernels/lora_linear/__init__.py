"""A linear layer with a low-rank update."""

from subspace_jax.kernels.lora_linear.api import lora_linear

__all__ = ["lora_linear"]
