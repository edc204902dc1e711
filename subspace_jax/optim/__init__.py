"""Optax transforms."""

from subspace_jax.optim.geometry import geometry_labels, with_geometry
from subspace_jax.optim.riemannian import (
    RiemannianAdamState,
    RiemannianSGDState,
    riemannian_adam,
    riemannian_sgd,
    scale_by_riemannian_adam,
    scale_by_riemannian_sgd,
)

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
