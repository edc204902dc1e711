"""Losses of classifiers."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy with integer labels.

    With label smoothing ``a`` the target is ``1 - a`` on the label plus ``a / classes`` everywhere (Szegedy et al.,
    arXiv 1512.00567, section 7).

    Args:
      logits: ``[batch, classes]``, floating point; the classes may be sharded.
      labels: ``[batch]`` integers in ``[0, classes)``.
      label_smoothing: ``a``, in ``[0, 1)``.

    Returns:
      Loss per example ``[batch]``, in nats, float32 or wider; NaN if a label is out of range.

    Raises:
      ValueError: Shapes do not match, or ``label_smoothing`` is out of range.
      TypeError: ``labels`` are not integers.
    """
    return _against_labels(jax.nn.logsumexp, logits, labels, label_smoothing)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Sigmoid cross-entropy: independent binary classification of every class, positive for the label only.

    The vector heads of "ResNet strikes back" (Wightman, Touvron and Jegou, arXiv 2110.00476) and DeiT3 are trained
    with it.  Label smoothing changes the targets as in :func:`cross_entropy`.

    Args:
      logits: ``[batch, classes]``, floating point; the classes may be sharded.
      labels: ``[batch]`` integers in ``[0, classes)``.
      label_smoothing: ``a``, in ``[0, 1)``.

    Returns:
      Loss per example ``[batch]``, the sum over its classes, in nats, float32 or wider; NaN if a label is out of
      range.

    Raises:
      ValueError: Shapes do not match, or ``label_smoothing`` is out of range.
      TypeError: ``labels`` are not integers.
    """
    return _against_labels(lambda x, axis: jnp.sum(jax.nn.softplus(x), axis), logits, labels, label_smoothing)


def _against_labels(normalizer, logits, labels, label_smoothing) -> jax.Array:
    """Returns the normalizer of all logits minus the logit of the target."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: expected logits [batch, classes], labels [batch]; got {logits.shape}, {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    logits = logits.astype(working_dtype(logits))
    total = normalizer(logits, axis=-1)
    # A masked sum instead of a gather, which an Explicit mesh refuses along sharded classes.
    is_label = jax.nn.one_hot(labels.astype(jnp.int32), logits.shape[-1], dtype=bool)
    picked = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    loss = jnp.where(in_range, total - picked, jnp.nan)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss + label_smoothing * (total - jnp.mean(logits, axis=-1))
