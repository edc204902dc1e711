"""Optax transforms."""

from subspace_jax.optim._projected import Basis, MatrixAxes
from subspace_jax.optim.coso import CoSOState, coso, coso_end_task
from subspace_jax.optim.fira import ScaledGradientState, apollo, apollo_mini, fira
from subspace_jax.optim.galore import galore, scale_by_galore
from subspace_jax.optim.geometry import geometry_labels, with_geometry
from subspace_jax.optim.gpm import GPMBasis, gpm_update, gradient_projection_memory, project_out
from subspace_jax.optim.online_subspace import OnlineSubspaceState, online_subspace_descent
from subspace_jax.optim.projection import LowRankProjectionState, low_rank_projection
from subspace_jax.optim.radam import RiemannianAdamState, riemannian_adam, scale_by_riemannian_adam
from subspace_jax.optim.rsgd import RiemannianSGDState, riemannian_sgd, scale_by_riemannian_sgd

__all__ = [
    "Basis",
    "CoSOState",
    "GPMBasis",
    "LowRankProjectionState",
    "MatrixAxes",
    "OnlineSubspaceState",
    "RiemannianAdamState",
    "RiemannianSGDState",
    "ScaledGradientState",
    "apollo",
    "apollo_mini",
    "coso",
    "coso_end_task",
    "fira",
    "galore",
    "geometry_labels",
    "gpm_update",
    "gradient_projection_memory",
    "low_rank_projection",
    "online_subspace_descent",
    "project_out",
    "riemannian_adam",
    "riemannian_sgd",
    "scale_by_galore",
    "scale_by_riemannian_adam",
    "scale_by_riemannian_sgd",
    "with_geometry",
]
