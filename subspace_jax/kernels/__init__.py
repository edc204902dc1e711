"""The hot low-rank paths: one public function each, with a reference for every platform and perhaps a Pallas kernel."""

from subspace_jax.kernels.grassmann_logits import grassmann_cross_entropy, grassmann_logits
from subspace_jax.kernels.projected_adam_step import projected_adam_step
from subspace_jax.kernels.subspace_residual import complement_basis, subspace_residual

__all__ = [
    "complement_basis",
    "grassmann_cross_entropy",
    "grassmann_logits",
    "projected_adam_step",
    "subspace_residual",
]
