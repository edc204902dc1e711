"""Energies of a weight's gradient."""

from subspace_jax.kernels.weight_grad_energy.api import weight_grad_energy
from subspace_jax.kernels.weight_grad_energy.probes import energy_probes

__all__ = ["energy_probes", "weight_grad_energy"]
