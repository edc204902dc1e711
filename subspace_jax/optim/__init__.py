"""Optax transforms."""

from subspace_jax.optim._basis import Basis
from subspace_jax.optim.lambda_orthogonality import add_lambda_orthogonality
from subspace_jax.optim.lora.adaprelora import AdaPreLoRAOptions, AdaPreLoRAState, adaprelora, scale_by_adaprelora
from subspace_jax.optim.lora.lora_plus import LoRAPlusState, lora_plus, scale_by_lora_plus
from subspace_jax.optim.lora.lora_pro import LoRAProOptions, LoRAProState, lora_pro, scale_by_lora_pro
from subspace_jax.optim.lora.lora_rite import LoRARITEOptions, LoRARITEState, lora_rite, scale_by_lora_rite
from subspace_jax.optim.lora.scaled_lora import (
    ScaledAdamWLoRAState,
    ScaledGDLoRAState,
    scale_by_scaled_adamw_lora,
    scale_by_scaled_gd_lora,
    scaled_adamw_lora,
    scaled_gd_lora,
)
from subspace_jax.optim.manifold.geometry import geometry_labels, with_geometry
from subspace_jax.optim.manifold.riemannian_adam import RiemannianAdamState, riemannian_adam, scale_by_riemannian_adam
from subspace_jax.optim.manifold.riemannian_sgd import RiemannianSGDState, riemannian_sgd, scale_by_riemannian_sgd
from subspace_jax.optim.projected._scaled_gradient import ScaledGradientState
from subspace_jax.optim.projected.apollo import apollo, apollo_mini
from subspace_jax.optim.projected.coso import CoSOState, coso, coso_end_task
from subspace_jax.optim.projected.fira import fira
from subspace_jax.optim.projected.galore import galore, scale_by_galore
from subspace_jax.optim.projected.gpm import GPMBasis, gpm_update, gradient_projection_memory, project_out
from subspace_jax.optim.projected.online_subspace import OnlineSubspaceState, online_subspace_descent
from subspace_jax.optim.projected.options import ProjectionOptions
from subspace_jax.optim.projected.project_gradient import project_gradient
from subspace_jax.optim.projected.projection import LowRankProjectionState, low_rank_projection
from subspace_jax.optim.quantized_state import QuantizedState, quantize_state
from subspace_jax.optim.random_subspace.subspace import (
    RandomSubspace,
    compress,
    decompress,
    projection_matrix,
    random_subspace,
)

__all__ = [
    "AdaPreLoRAOptions",
    "AdaPreLoRAState",
    "Basis",
    "CoSOState",
    "GPMBasis",
    "LoRAPlusState",
    "LoRAProOptions",
    "LoRAProState",
    "LoRARITEOptions",
    "LoRARITEState",
    "LowRankProjectionState",
    "OnlineSubspaceState",
    "ProjectionOptions",
    "QuantizedState",
    "RandomSubspace",
    "RiemannianAdamState",
    "RiemannianSGDState",
    "ScaledAdamWLoRAState",
    "ScaledGDLoRAState",
    "ScaledGradientState",
    "adaprelora",
    "add_lambda_orthogonality",
    "apollo",
    "apollo_mini",
    "compress",
    "coso",
    "coso_end_task",
    "decompress",
    "fira",
    "galore",
    "geometry_labels",
    "gpm_update",
    "gradient_projection_memory",
    "lora_plus",
    "lora_pro",
    "lora_rite",
    "low_rank_projection",
    "online_subspace_descent",
    "project_gradient",
    "project_out",
    "projection_matrix",
    "quantize_state",
    "random_subspace",
    "riemannian_adam",
    "riemannian_sgd",
    "scale_by_adaprelora",
    "scale_by_galore",
    "scale_by_lora_plus",
    "scale_by_lora_pro",
    "scale_by_lora_rite",
    "scale_by_riemannian_adam",
    "scale_by_riemannian_sgd",
    "scale_by_scaled_adamw_lora",
    "scale_by_scaled_gd_lora",
    "scaled_adamw_lora",
    "scaled_gd_lora",
    "with_geometry",
]


def __dir__():
    return __all__
