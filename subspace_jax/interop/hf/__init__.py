"""Models in the checkpoints of Hugging Face transformers: a module for each family."""

from subspace_jax.interop.hf import causal_lm, clip, resnet, swin, vit

__all__ = ["causal_lm", "clip", "resnet", "swin", "vit"]
