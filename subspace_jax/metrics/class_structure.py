"""Variability within classes, and separation of classes.

Both measures are those of the transfer tables of arXiv 2308.01547; class separation is R^2 of Kornblith et al.,
"Why Do Better Loss Functions Lead to Less Transferable Features?" (arXiv 2010.16402).
"""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import binary_scale, unit_vectors, working_dtype

_ROWS_AT_A_TIME = 256


def intra_class_variability(features: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean angle between two examples of one class, averaged over the classes.

    Features are centered by their global mean first.  Takes n x N^2 multiplications, and memory for 256 x N cosines
    at a time.

    Args:
      features: ``[examples, n]``, floating point.
      labels: ``[examples]`` integers.

    Returns:
      A scalar in degrees, float32 or wider.  Classes of a single example do not count; NaN if no class has two.

    Raises:
      ValueError: Shapes do not match.
    """
    unit = _centered_unit(features, labels)
    group, sizes = _classes(labels, unit.dtype)
    same_class_count = sizes[group]
    index = jnp.arange(labels.shape[0])

    def mean_angle_to_class(row):
        vector, own, i, count = row
        # Full precision: an angle near zero has the square root of its cosine's error.
        cosines = jnp.clip(jnp.matmul(unit, vector, precision=jax.lax.Precision.HIGHEST), -1.0, 1.0)
        others = (group == own) & (index != i)
        return jnp.sum(jnp.where(others, jnp.arccos(cosines), 0.0)) / jnp.maximum(count - 1.0, 1.0)

    rows = (unit, group, index, same_class_count)
    per_example = jax.lax.map(mean_angle_to_class, rows, batch_size=_ROWS_AT_A_TIME)
    weight = jnp.where(same_class_count > 1, 1.0 / same_class_count, 0.0)
    return jnp.rad2deg(jnp.sum(weight * per_example) / jnp.sum(weight))


def class_separation_r2(features: jax.Array, labels: jax.Array) -> jax.Array:
    """One minus the mean cosine distance within classes over that of all pairs of classes.

    Features are centered by their global mean first; every class and every pair of classes has the same weight.  Costs
    O(N n): mean pairwise cosines are squared lengths of class means.

    Args:
      features: ``[examples, n]``, floating point.
      labels: ``[examples]`` integers.

    Returns:
      A scalar, at most 1; float32 or wider.

    Raises:
      ValueError: Shapes do not match.
    """
    unit = _centered_unit(features, labels)
    group, sizes = _classes(labels, unit.dtype)
    num_classes = jnp.sum((sizes > 0).astype(unit.dtype))
    class_means = jax.ops.segment_sum(unit / sizes[group][:, None], group, labels.shape[0])
    within = 1.0 - jnp.sum(jnp.square(class_means)) / num_classes
    total = 1.0 - jnp.sum(jnp.square(jnp.sum(class_means, axis=0) / num_classes))
    return 1.0 - within / total


def _centered_unit(features: jax.Array, labels: jax.Array) -> jax.Array:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features, labels: expected [examples, n] and [examples], got {features.shape} and {labels.shape}"
        )
    features = features.astype(working_dtype(features))
    # Divided, so that sums stay in range, and centered twice: of features far from 0 the mean is rounded.
    features = features / binary_scale(features)
    centered = features - jnp.mean(features, axis=0, keepdims=True)
    return unit_vectors(centered - jnp.mean(centered, axis=0, keepdims=True))


def _classes(labels: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns the index of each example's class among those that occur, and the class sizes, padded with 0."""
    _, group, sizes = jnp.unique(labels, return_inverse=True, return_counts=True, size=labels.shape[0])
    return group, sizes.astype(dtype)
