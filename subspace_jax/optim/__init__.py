"""Optax transforms."""

from subspace_jax.optim.geometry import geometry_labels, with_geometry
from subspace_jax.optim.radam import RiemannianAdamState, riemannian_adam, scale_by_riemannian_adam
from subspace_jax.optim.rsgd import RiemannianSGDState, riemannian_sgd, scale_by_riemannian_sgd

__all__ = [
    "RiemannianAdamState",
    "RiemannianSGDState",
    "geometry_labels",
    "riemannian_adam",
    "riemannian_sgd",
    "scale_by_riemannian_adam",
    "scale_by_riemannian_sgd",
    "with_geometry",
]
