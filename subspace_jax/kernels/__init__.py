"""The hot low-rank paths: one public function each, with a reference for every platform and perhaps a Pallas kernel."""

from subspace_jax.kernels.grassmann_logits import grassmann_cross_entropy, grassmann_logits
from subspace_jax.kernels.projected_adam_step import projected_adam_step

__all__ = ["grassmann_cross_entropy", "grassmann_logits", "projected_adam_step"]
