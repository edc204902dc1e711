"""Loss functions: arrays in, one value per example out."""

from subspace_jax.losses.classification import binary_cross_entropy, cross_entropy
from subspace_jax.losses.contrastive import clip_loss, siglip_loss
from subspace_jax.losses.multi_positive import (
    multi_positive_infonce,
    scan_keys,
    supervised_contrastive,
    supervised_infonce,
)
from subspace_jax.losses.orthogonality import (
    lambda_orthogonality,
    lambda_orthogonality_tree,
    orthogonality_residual,
)

__all__ = [
    "binary_cross_entropy",
    "clip_loss",
    "cross_entropy",
    "lambda_orthogonality",
    "lambda_orthogonality_tree",
    "multi_positive_infonce",
    "orthogonality_residual",
    "scan_keys",
    "siglip_loss",
    "supervised_contrastive",
    "supervised_infonce",
]


def __dir__():
    return __all__
