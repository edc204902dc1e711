"""Norms of the columns of an adapted weight, without the weight."""

from subspace_jax.kernels.dora_weight_norm.api import column_energy, dora_weight_norm, least_norm
from subspace_jax.kernels.dora_weight_norm.chunks import norm_chunk_size

__all__ = ["column_energy", "dora_weight_norm", "least_norm", "norm_chunk_size"]
