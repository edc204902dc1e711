"""Distances between two samples of features: how far a target domain is from its source.

They are the domain-gap terms of few-shot adaptation (arXiv 2401.01736); the bound in which a gap stands is that of
Ben-David et al., "A theory of learning from different domains", Machine Learning 79, 2010.
"""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import pairwise_sq_distances, working_dtype

_HIGHEST = jax.lax.Precision.HIGHEST
_ROWS_AT_A_TIME = 256


def proxy_a_distance(err: jax.typing.ArrayLike) -> jax.Array:
    """Returns the proxy A-distance ``2 (1 - 2 err)`` of a domain classifier (Ben-David et al. 2010, section 4).

    Args:
      err: Held-out error of a classifier that tells the two domains apart, in ``[0, 1/2]``; an error above 1/2 counts
        as 1/2, for the opposite answer has a smaller one.

    Returns:
      The distance, in ``[0, 2]``; 2 for domains that are told apart without error.

    Raises:
      ValueError: ``err`` is not traced and outside ``[0, 1]``.
    """
    err = jnp.asarray(err)
    if not isinstance(err, jax.core.Tracer) and not bool(jnp.all((err >= 0) & (err <= 1))):
        raise ValueError(f"err: expected errors in [0, 1], got {err}")
    return 2.0 * (1.0 - 2.0 * jnp.minimum(err, 0.5))


def mmd2(x: jax.Array, y: jax.Array, sigma: jax.typing.ArrayLike = 1.0, *, biased: bool = False) -> jax.Array:
    """Squared maximum mean discrepancy with the kernel ``exp(-||a - b||^2 / (2 sigma^2))``.

    Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, lemma 6.  Kernels are computed for 256 rows at a time.

    Args:
      x: ``[examples, n]``, floating point.
      y: ``[others, n]``.
      sigma: Width of the kernel, in the unit of the features.
      biased: Whether an example is paired with itself too: then the estimate is at least 0, and 0 for equal samples.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: The widths differ, or a sample has fewer than two examples.
    """
    x, y = _pair(x, y)
    of_x, of_y = (_kernel_sum(part, part, sigma) for part in (x, y))
    n, m = x.shape[0], y.shape[0]
    cross = _kernel_sum(x, y, sigma) / (n * m)
    if biased:
        return of_x / (n * n) + of_y / (m * m) - 2.0 * cross
    # An example is at distance 0 of itself, which the kernel maps to 1.
    return (of_x - n) / (n * (n - 1)) + (of_y - m) / (m * (m - 1)) - 2.0 * cross


def coral(x: jax.Array, y: jax.Array) -> jax.Array:
    """CORAL distance ``||cov(x) - cov(y)||_F^2 / (4 n^2)`` (Sun and Saenko, arXiv 1607.01719, equation 1).

    Args:
      x: ``[examples, n]``, floating point.
      y: ``[others, n]``.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: See :func:`mmd2`.
    """
    x, y = _pair(x, y)
    return jnp.sum(jnp.square(_covariance(x) - _covariance(y))) / (4.0 * x.shape[1] ** 2)


def frechet_distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared Frechet distance of the Gaussians with the samples' means and covariances, as in FID (arXiv 1706.08500).

    ``||mu_x - mu_y||^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2)``; the last trace is the sum of the singular values of
    ``S^1/2 T^1/2``, so that no root of a rounded negative number is taken.

    Args:
      x: ``[examples, n]``, floating point.
      y: ``[others, n]``.

    Returns:
      A scalar, float32 or wider; at least 0 but for rounding.

    Raises:
      ValueError: See :func:`mmd2`.
    """
    x, y = _pair(x, y)
    s, t = _covariance(x), _covariance(y)
    cross = jnp.linalg.svd(jnp.matmul(_root(s), _root(t), precision=_HIGHEST), compute_uv=False)
    return jnp.square(mean_gap(x, y)) + jnp.trace(s) + jnp.trace(t) - 2.0 * jnp.sum(cross)


def mean_gap(x: jax.Array, y: jax.Array) -> jax.Array:
    """Length of the difference of the samples' means.

    Args:
      x: ``[examples, n]``, floating point.
      y: ``[others, n]``.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: See :func:`mmd2`.
    """
    x, y = _pair(x, y)
    return jnp.linalg.norm(jnp.mean(x, axis=0) - jnp.mean(y, axis=0))


def _pair(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(x.shape[0], y.shape[0]) < 2:
        raise ValueError(
            f"x, y: expected [examples, n] and [others, n] with two or more of each, got {x.shape} and {y.shape}"
        )
    dtype = jnp.promote_types(working_dtype(x), working_dtype(y))
    return x.astype(dtype), y.astype(dtype)


def _kernel_sum(x: jax.Array, y: jax.Array, sigma: jax.typing.ArrayLike) -> jax.Array:
    """The sum of the kernel over all pairs, by rows of ``x``."""
    scale = (-0.5 / jnp.square(jnp.asarray(sigma, x.dtype))).astype(x.dtype)

    def of_row(row):
        return jnp.sum(jnp.exp(scale * pairwise_sq_distances(row[None], y)))

    return jnp.sum(jax.lax.map(of_row, x, batch_size=_ROWS_AT_A_TIME))


def _covariance(x: jax.Array) -> jax.Array:
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    return jnp.matmul(centered.T, centered, precision=_HIGHEST) / (x.shape[0] - 1)


def _root(covariance: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh(covariance)
    return jnp.matmul(vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None], vectors.T, precision=_HIGHEST)
