"""Loss functions: arrays in, one value per example out."""

from subspace_jax.losses.classification import binary_cross_entropy, cross_entropy
from subspace_jax.losses.contrastive import clip_loss, siglip_loss

__all__ = ["binary_cross_entropy", "clip_loss", "cross_entropy", "siglip_loss"]


def __dir__():
    return __all__
