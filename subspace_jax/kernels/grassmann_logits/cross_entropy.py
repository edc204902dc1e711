"""Cross-entropy of Grassmann logits whose classes may be sharded."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax.kernels.grassmann_logits.api import grassmann_logits


def grassmann_cross_entropy(
    x: jax.Array,
    bases: jax.Array,
    labels: jax.Array,
    gamma: ArrayLike = 25.0,
    *,
    axis_name: str | Sequence[str] | None = None,
    label_smoothing: float = 0.0,
    implementation: str | None = None,
    block: int | None = None,
) -> jax.Array:
    """Softmax cross-entropy of :func:`grassmann_logits` with integer labels, for unsharded or sharded classes.

    With unsharded arrays, or arrays sharded over Auto or Explicit mesh axes, omit ``axis_name``: logits stay sharded
    like batch and classes, and only maxima and sums over classes are communicated, ``[batch]`` each.  Within
    ``shard_map``, pass the mesh axes that shard ``bases`` and the device's shard of it; three or four sums of
    ``[batch]`` are communicated.  Gradients are exact if ``shard_map`` checks types (its default); with
    ``check_vma=False`` only if the derivative is taken outside of it.

    Costs are those of :func:`grassmann_logits`, plus one write and read of ``[batch, classes]`` for the softmax.

    Source: arXiv 2308.01547, section 3; label smoothing: arXiv 1512.00567, section 7.

    Args:
      x: Features ``[batch, n]``, floating point; of unit length for the paper's loss.
      bases: ``[classes, n, k]``, floating point; with ``axis_name`` the shard of this device.
      labels: ``[batch]`` integers in ``[0, all classes)``.
      gamma: Scale of the logits, a scalar.
      axis_name: Within ``shard_map``, the mesh axes that shard the classes, major to minor.
      label_smoothing: ``a`` in ``[0, 1)``: the target is ``1 - a`` on the label plus ``a / classes`` everywhere.
      implementation: None or "xla".
      block: Classes per group; None for a value by batch and k.

    Returns:
      Loss per example ``[batch]``, in nats, float32 or wider; NaN if a label is out of range.

    Raises:
      ValueError: Shapes do not match, an axis is empty, ``label_smoothing`` is out of range, or the implementation does
        not exist or is not supported.
      TypeError: ``labels`` are not integers, or an array is not floating point.
    """
    if x.ndim != 2 or labels.shape != x.shape[:1]:
        raise ValueError(f"labels: expected [batch] for x [batch, n]; got labels {labels.shape}, x {x.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    logits = grassmann_logits(x, bases, gamma, implementation=implementation, block=block)
    here = logits.shape[-1]
    classes = here * (jax.lax.axis_size(axes) if axes else 1)
    first = jax.lax.axis_index(axes) * here if axes else 0

    def total(a):
        a = jnp.sum(a, axis=-1)
        return jax.lax.psum(a, axes) if axes else a

    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    highest = jax.lax.pmax(highest, axes) if axes else highest
    log_normalizer = highest + jnp.log(total(jnp.exp(logits - highest[:, None])))
    # A masked sum instead of a gather, which an Explicit mesh refuses along sharded classes.
    is_label = jax.nn.one_hot(labels.astype(jnp.int32) - first, here, dtype=bool)
    picked = total(jnp.where(is_label, logits, 0.0))
    loss = jnp.where((labels >= 0) & (labels < classes), log_normalizer - picked, jnp.nan)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss + label_smoothing * (log_normalizer - total(logits) / classes)
