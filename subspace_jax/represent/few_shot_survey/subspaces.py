"""Subspaces of features in which to compare images and prototypes: a design choice of this library.

A projection is a pair of matrices, for features and for prototypes; what is projected goes into any of the methods.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg import canonical_svd, times, working_dtype
from subspace_jax.represent.few_shot_survey.clip_adapter import Shots
from subspace_jax.represent.few_shot_survey.prototypes import check_labels, check_widths


class Projection(NamedTuple):
    """Linear maps of features and of prototypes into one space.

    Attributes:
      image: ``[n, k]``.
      text: ``[n, k]``.
      image_mean: ``[n]``, subtracted from features first.
      text_mean: ``[n]``, subtracted from prototypes first.
    """

    image: jax.Array
    text: jax.Array
    image_mean: jax.Array
    text_mean: jax.Array

    def of_images(self, features: jax.Array) -> jax.Array:
        """Projects features ``[examples, n]`` to ``[examples, k]``."""
        return times(features.astype(self.image.dtype) - self.image_mean[None], self.image)

    def of_texts(self, text: jax.Array) -> jax.Array:
        """Projects prototypes ``[classes, n]`` to ``[classes, k]``."""
        return times(text.astype(self.text.dtype) - self.text_mean[None], self.text)


def text_subspace(text: jax.Array, k: int) -> Projection:
    """The leading ``k`` principal directions of the prototypes, uncentered, for both sides.

    With ``k`` the rank of the prototypes, cosines change by a factor for each feature alone: what is lost is what no
    prototype has.

    Args:
      text: Prototypes ``[classes, n]``.
      k: Number of directions, at most ``min(classes, n)``.

    Raises:
      ValueError: ``k`` is out of range.
    """
    if text.ndim != 2 or not 1 <= k <= min(text.shape):
        raise ValueError(f"k: expected 1 to the smaller of [classes, n] = {text.shape}, got {k}")
    basis = canonical_svd(text.astype(working_dtype(text)))[2][:k].T
    nothing = jnp.zeros(text.shape[1], basis.dtype)
    return Projection(basis, basis, nothing, nothing)


def cca_subspace(shots: Shots, text: jax.Array, k: int, *, ridge: float = 0.1) -> Projection:
    """The leading ``k`` canonical directions between labelled features and the prototypes of their labels.

    Args:
      shots: Labelled features.
      text: Prototypes ``[classes, n]``.
      k: Number of directions, at most ``min(classes - 1, n)``, the rank of centered prototypes.
      ridge: Added to both covariances, as a share of their mean eigenvalue: few shots leave most directions unseen.

    Raises:
      ValueError: Shapes don't match, a label is out of range, ``k`` is out of range, or ``ridge`` is not positive.
    """
    check_widths(shots.features, text)
    check_labels(shots.features, shots.labels, text.shape[0])
    if not 1 <= k <= min(text.shape[0] - 1, text.shape[1]):
        raise ValueError(f"k: expected 1 to {min(text.shape[0] - 1, text.shape[1])}, got {k}")
    if not ridge > 0:
        raise ValueError(f"ridge: expected a positive number, got {ridge}")
    dtype = working_dtype(shots.features, text)
    pair = shots.features.astype(dtype), text.astype(dtype)[shots.labels]
    means = [jnp.mean(x, axis=0) for x in pair]
    x, y = (part - mean[None] for part, mean in zip(pair, means, strict=True))
    of_x, of_y = (_inverse_root(part, ridge) for part in (x, y))
    u, values, vt = canonical_svd(times(times(of_x, times(x.T, y) / x.shape[0]), of_y))
    # Each direction counts as much as it is correlated.
    weight = jnp.sqrt(values[:k])[None]
    return Projection(times(of_x, u[:, :k]) * weight, times(of_y, vt[:k].T) * weight, *means)


def _inverse_root(x: jax.Array, ridge: float) -> jax.Array:
    covariance = times(x.T, x) / x.shape[0]
    values, vectors = jnp.linalg.eigh(covariance)
    return times(vectors * jax.lax.rsqrt(jnp.maximum(values, 0.0) + ridge * jnp.mean(values))[None], vectors.T)
