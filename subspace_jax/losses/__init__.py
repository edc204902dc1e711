"""Loss functions: arrays in, one value per example out."""

from subspace_jax.losses.classification import binary_cross_entropy, cross_entropy
from subspace_jax.losses.contrastive import clip_loss, siglip_loss
from subspace_jax.losses.multi_positive import (
    multi_positive_infonce,
    scan_keys,
    supervised_contrastive,
    supervised_infonce,
)
from subspace_jax.losses.variational import (
    cross_correlation,
    cross_correlation_penalty,
    gaussian_kl,
    reparameterize,
)

__all__ = [
    "binary_cross_entropy",
    "clip_loss",
    "cross_correlation",
    "cross_correlation_penalty",
    "cross_entropy",
    "gaussian_kl",
    "multi_positive_infonce",
    "reparameterize",
    "scan_keys",
    "siglip_loss",
    "supervised_contrastive",
    "supervised_infonce",
]


def __dir__():
    return __all__
