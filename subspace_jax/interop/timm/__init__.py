"""Vision models in the checkpoints of timm: a module for each family, see :mod:`subspace_jax.interop.vision`."""

from subspace_jax.interop.timm import resnet, swin, vit

__all__ = ["resnet", "swin", "vit"]
