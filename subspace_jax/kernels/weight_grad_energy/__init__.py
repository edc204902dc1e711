"""Energies of a weight's gradient."""

from subspace_jax.kernels.weight_grad_energy.api import weight_grad_energy

__all__ = ["weight_grad_energy"]
