"""Logits of classification heads: cosine softmax, and one subspace per class.

The Grassmann logits are those of "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann
Class Representation" (Wang, Li, Zhang, ICCV 2023, arXiv 2308.01547).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import kernels
from subspace_jax.linalg import working_dtype
from subspace_jax.nn.layers.linear import linear


def normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Scales vectors along the last axis to unit length: ``x / max(||x||, eps)``.

    The norm is accumulated in at least float32.  A zero vector stays zero, with a finite gradient.

    Args:
      x: ``[..., n]``, floating point.
      eps: Lower bound of the divisor.

    Returns:
      ``[..., n]`` in float32, or float64 where ``x`` is float64.

    Raises:
      TypeError: ``x`` is not floating point.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected floating point, got {x.dtype}")
    x = x.astype(working_dtype(x))
    return x / jnp.maximum(safe_norm(x, keepdims=True), eps)


def safe_norm(x: jax.Array, keepdims: bool = False) -> jax.Array:
    """Euclidean norm over the last axis, with gradient zero instead of NaN at zero.

    Args:
      x: ``[..., n]``, at least float32.
      keepdims: Whether to keep the reduced axis with size one.

    Returns:
      ``[...]`` (or ``[..., 1]``).
    """
    q = jnp.sum(jnp.square(x), axis=-1, keepdims=keepdims)
    positive = q > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, q, 1.0)), 0.0)


def grassmann_logits(x: jax.Array, bases: jax.Array | Sequence[jax.Array], gamma: ArrayLike = 25.0) -> jax.Array:
    """Length of each feature's projection onto each class subspace: ``gamma * ||S_c^T x / ||x||||``.

    Source: arXiv 2308.01547, section 3.  Matmuls run in the dtype of ``x`` with float32 accumulation; the length is
    float32 (float64 for float64 ``x``).  For orthonormal bases the logits are in ``[0, gamma]`` and invariant to a
    change of basis.  They are computed by :func:`subspace_jax.kernels.grassmann_logits`, which never stores
    ``[batch, classes, k]``, in the backward pass either.

    Args:
      x: Features ``[batch, n]``, floating point.
      bases: Orthonormal bases ``[classes, n, k]``, or a sequence of such arrays with different ``k``.
      gamma: Scale of the logits.

    Returns:
      Logits ``[batch, classes]``; for a sequence, those of the arrays are concatenated.

    Raises:
      ValueError: Shapes don't match, or an axis is missing or empty.
      TypeError: ``x`` is not floating point.
    """
    groups = bases if isinstance(bases, Sequence) else (bases,)
    for group in groups:
        if x.ndim != 2 or group.ndim != 3 or x.shape[-1] != group.shape[-2]:
            raise ValueError(
                f"grassmann_logits: expected x [batch, n] and bases [classes, n, k]; got {x.shape} and {group.shape}"
            )
    unit = normalize(x).astype(x.dtype)
    logits = [kernels.grassmann_logits(unit, group, gamma) for group in groups]
    return logits[0] if len(logits) == 1 else jnp.concatenate(logits, axis=-1)


def cosine_logits(x: jax.Array, kernel: jax.Array, gamma: float = 25.0) -> jax.Array:
    """Scaled cosine of features and class vectors, ``gamma * cos(x, w_c)``.

    Args:
      x: Features ``[batch, n]``, floating point.
      kernel: Class vectors ``[n, classes]``, of any norm.
      gamma: Scale of the logits.

    Returns:
      Logits ``[batch, classes]``, at least float32.

    Raises:
      ValueError: Widths do not match.
      TypeError: An array is not floating point.
    """
    unit = normalize(kernel.T).T.astype(x.dtype)
    logits = linear(normalize(x).astype(x.dtype), unit)
    return gamma * logits.astype(working_dtype(logits))
