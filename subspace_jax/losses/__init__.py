"""Loss functions: arrays in, one value per example out."""

from subspace_jax.losses.classification import binary_cross_entropy, cross_entropy
from subspace_jax.losses.coding_rate import coding_rate, coding_rate_membership, mcr2_loss, tcr_loss
from subspace_jax.losses.contrastive import clip_loss, siglip_loss
from subspace_jax.losses.decoupling import decoupling_penalty, project_out
from subspace_jax.losses.margin import MarginTerms, Pairs, margin_loss, pairwise_distances, sample_pairs
from subspace_jax.losses.multi_positive import (
    multi_positive_infonce,
    scan_keys,
    supervised_contrastive,
    supervised_infonce,
)
from subspace_jax.losses.orthogonality import lambda_orthogonality, lambda_orthogonality_tree, orthogonality_residual
from subspace_jax.losses.variational import cross_correlation, cross_correlation_penalty, gaussian_kl, reparameterize

__all__ = [
    "MarginTerms",
    "Pairs",
    "binary_cross_entropy",
    "clip_loss",
    "coding_rate",
    "coding_rate_membership",
    "cross_correlation",
    "cross_correlation_penalty",
    "cross_entropy",
    "decoupling_penalty",
    "gaussian_kl",
    "lambda_orthogonality",
    "lambda_orthogonality_tree",
    "margin_loss",
    "mcr2_loss",
    "multi_positive_infonce",
    "orthogonality_residual",
    "pairwise_distances",
    "project_out",
    "reparameterize",
    "sample_pairs",
    "scan_keys",
    "siglip_loss",
    "supervised_contrastive",
    "supervised_infonce",
    "tcr_loss",
]


def __dir__():
    return __all__
