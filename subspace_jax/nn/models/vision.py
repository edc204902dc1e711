"""Output, input checks and linear head of all vision backbones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype
from subspace_jax.nn.layers.linear import linear

PyTree = Any


class VisionOutput(NamedTuple):
    """The output of a vision backbone; fields that were not asked for, or that the family lacks, are None.

    Attributes:
      logits: Class scores ``[batch, classes]``, where the model has a head.
      pooled: Pooled features ``[batch, width]``.
      tokens: The last features before pooling: ``[batch, tokens, width]``, or ``[batch, height, width, channels]`` of
        convolutional networks.
      hidden: The captured hidden states, in the order of depth.
      batch_stats: Running statistics after a training step, with the structure of those passed in.
    """

    logits: jax.Array | None = None
    pooled: jax.Array | None = None
    tokens: jax.Array | None = None
    hidden: tuple[jax.Array, ...] | None = None
    batch_stats: Any = None


def check_pixels(pixels: jax.Array, channels: int) -> None:
    """Checks that ``pixels`` are floating-point images ``[batch, height, width, channels]``.

    Raises:
      ValueError: They have another shape.
      TypeError: They are not floating point.
    """
    if pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise ValueError(f"pixels: expected [batch, height, width, {channels}], got {pixels.shape}")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise TypeError(f"pixels: expected standardized floating-point images, got {pixels.dtype}")


def head_logits(params: PyTree, pooled: jax.Array) -> jax.Array | None:
    """Returns class scores of pooled features, in at least float32; None where the parameters have no head."""
    if "head" not in params:
        return None
    return linear(pooled, params["head"]["kernel"], params["head"].get("bias"), out_dtype=working_dtype(pooled))
