"""Losses of classifiers."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy with integer labels.

    With label smoothing ``a`` the target is ``1 - a`` on the label plus ``a / classes`` everywhere (Szegedy et al.,
    arXiv 1512.00567, section 7).

    Args:
      logits: ``[batch, classes]``, at least float32.
      labels: ``[batch]`` integers in ``[0, classes)``.
      label_smoothing: ``a``, in ``[0, 1)``.

    Returns:
      Loss of each example ``[batch]``, in nats.

    Raises:
      ValueError: Shapes do not match.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: expected logits [batch, classes], labels [batch]; got {logits.shape}, {labels.shape}"
        )
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    loss = log_normalizer - picked
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss + label_smoothing * (log_normalizer - jnp.mean(logits, axis=-1))
