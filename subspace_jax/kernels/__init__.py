"""The hot low-rank paths: one public function each, with a reference for every platform and perhaps a Pallas kernel."""

from subspace_jax.kernels.dora_linear import dora_compose, dora_linear
from subspace_jax.kernels.dora_weight_norm import column_energy, dora_weight_norm, least_norm, norm_chunk_size
from subspace_jax.kernels.grassmann_logits import grassmann_cross_entropy, grassmann_logits
from subspace_jax.kernels.grassmann_step import grassmann_step
from subspace_jax.kernels.lora_linear import lora_linear
from subspace_jax.kernels.projected_adam_step import projected_adam_step
from subspace_jax.kernels.subspace_residual import complement_basis, subspace_residual
from subspace_jax.kernels.weight_grad_energy import energy_probes, weight_grad_energy

__all__ = [
    "column_energy",
    "complement_basis",
    "dora_compose",
    "dora_linear",
    "dora_weight_norm",
    "energy_probes",
    "grassmann_cross_entropy",
    "grassmann_logits",
    "grassmann_step",
    "least_norm",
    "lora_linear",
    "norm_chunk_size",
    "projected_adam_step",
    "subspace_residual",
    "weight_grad_energy",
]


def __dir__():
    return __all__
