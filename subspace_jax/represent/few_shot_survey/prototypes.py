"""Prototypes of classes, and classification by the nearest of them in cosine similarity."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import times, unit_vectors, working_dtype


def zero_shot_logits(features: jax.Array, text: jax.Array, scale: jax.typing.ArrayLike = 100.0) -> jax.Array:
    """Classifies features by the cosine similarity to each class's prototype.

    Args:
      features: ``[examples, n]``, floating point, of any length.
      text: Prototypes ``[classes, n]``, of any length.
      scale: Factor on the cosines, ``exp(logit_scale)`` of the dual encoder; 100 in CLIP.

    Returns:
      Logits ``[examples, classes]``, float32 or wider.

    Raises:
      ValueError: The widths differ.
    """
    check_widths(features, text)
    dtype = working_dtype(features, text)
    cosines = times(unit_vectors(features.astype(dtype)), unit_vectors(text.astype(dtype)).T)
    return jnp.asarray(scale, dtype) * cosines


def text_prototypes(embeddings: jax.Array) -> jax.Array:
    """Averages the embeddings of a class's prompts: each is normalized, then their mean is.

    Args:
      embeddings: ``[classes, templates, n]``, floating point.

    Returns:
      Unit vectors ``[classes, n]``, float32 or wider.

    Raises:
      ValueError: The shape is another one, or an embedding that is not traced is zero.
    """
    if embeddings.ndim != 3:
        raise ValueError(f"embeddings: expected [classes, templates, n], got {embeddings.shape}")
    check_lengths("embeddings", embeddings)
    return unit_vectors(jnp.mean(unit_vectors(embeddings.astype(working_dtype(embeddings))), axis=1))


def class_prototypes(features: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """As :func:`text_prototypes`, for classes of different numbers of embeddings.

    Args:
      features: ``[examples, n]``, floating point.
      labels: ``[examples]`` integers.
      num_classes: Number of classes; each has an example.

    Returns:
      Unit vectors ``[num_classes, n]``, float32 or wider.

    Raises:
      ValueError: Shapes don't match, or, where they are not traced, a label is out of range, a class has no example or
        a feature is zero.
    """
    check_labels(features, labels, num_classes)
    if not isinstance(labels, jax.core.Tracer):
        missing = np.setdiff1d(np.arange(num_classes), np.asarray(labels))
        if len(missing):
            raise ValueError(f"labels: expected an example of each of {num_classes} classes, none of {missing[:5]}")
    check_lengths("features", features)
    unit = unit_vectors(jnp.asarray(features, working_dtype(features)))
    sums = jax.ops.segment_sum(unit, labels, num_classes)
    return unit_vectors(sums)


def check_widths(features: jax.Array, text: jax.Array) -> None:
    """Raises a ValueError where features and prototypes have different widths."""
    if features.ndim != 2 or text.ndim != 2 or features.shape[1] != text.shape[1]:
        raise ValueError(
            f"features, text: expected [examples, n] and [classes, n], got {features.shape} and {text.shape}"
        )


def check_labels(features: jax.Array, labels: jax.Array, num_classes: int) -> None:
    """Raises a ValueError for labels of another number than features, or, not traced, outside the classes."""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features, labels: expected [examples, n] and [examples], got {features.shape} and {labels.shape}"
        )
    if isinstance(labels, jax.core.Tracer) or not labels.size:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels: expected integers in 0 to {num_classes - 1}, got {low} to {high}")


def check_lengths(name: str, vectors: jax.Array) -> None:
    """Raises a ValueError for a vector of length 0, or one that is not finite; traced ones pass."""
    if isinstance(vectors, jax.core.Tracer):
        return
    largest = np.max(np.abs(np.asarray(vectors)), axis=-1).ravel()
    bad = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if len(bad):
        raise ValueError(f"{name}: expected finite vectors other than 0, got {len(bad)}, the first at {bad[0]}")
