"""Loss functions: arrays in, one value for each example out."""

from subspace_jax.losses.classification import cross_entropy
from subspace_jax.losses.contrastive import clip_loss, siglip_loss

__all__ = ["clip_loss", "cross_entropy", "siglip_loss"]
