"""Flax NNX modules, thin over pure functions.

Parameters carry logical axis names in their ``axes`` metadata; :mod:`subspace_jax.train` maps them to mesh axes.
"""

from subspace_jax.nn.backbones import MLP, ConvNet, conv, group_norm
from subspace_jax.nn.heads import (
    CosineHead,
    GrassmannHead,
    SoftmaxHead,
    cosine_logits,
    grassmann_logits,
    normalize,
    safe_norm,
)
from subspace_jax.nn.linear import Linear, StructuredKernel, linear

__all__ = [
    "MLP",
    "ConvNet",
    "CosineHead",
    "GrassmannHead",
    "Linear",
    "SoftmaxHead",
    "StructuredKernel",
    "conv",
    "cosine_logits",
    "grassmann_logits",
    "group_norm",
    "linear",
    "normalize",
    "safe_norm",
]
