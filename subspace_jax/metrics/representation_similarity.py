"""How alike two representations of the same examples are: CCA, SVCCA, PWCCA, Procrustes and linear regression.

All are in ``[0, 1]``, 1 for a representation with itself, and well above 0 for independent ones where there are few
examples for the width: compare with shuffled examples.
"""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import binary_scale, cca, centered_columns, gram, times, whitened_columns, working_dtype


def cca_mean(rho: jax.Array, threshold: float | None = None) -> jax.Array:
    """Mean canonical correlation (arXiv 1706.05806).

    Args:
      rho: Canonical correlations ``[k]``, descending.
      threshold: A share of their sum: those after the first ones that reach it do not count.  All count by default.

    Returns:
      A scalar.

    Raises:
      ValueError: ``threshold`` is not in ``(0, 1]``.
    """
    if threshold is None:
        return jnp.mean(rho)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share above 0, at most 1, got {threshold}")
    sums = jnp.cumsum(rho)
    counted = sums - rho < threshold * sums[-1]
    return jnp.sum(jnp.where(counted, rho, 0)) / jnp.sum(counted.astype(rho.dtype))


def svcca(x: jax.Array, y: jax.Array, keep: float = 0.99, *, criterion: str = "variance") -> jax.Array:
    """Singular vector canonical correlation (arXiv 1706.05806): the mean CCA of the leading singular directions.

    Args:
      x: ``[n, p]``, floating point.
      y: ``[n, q]``, of the same examples.
      keep: Share that the kept directions of each side hold.
      criterion: ``"variance"``, the share of the sum of squared singular values of centered columns that is reached;
        or ``"singular_values"``, that of the singular values of the columns as they are, not quite reached: the form
        of widespread code.

    Returns:
      The mean correlation over the smaller number of kept directions, a scalar; float32 or wider.

    Raises:
      ValueError: The numbers of examples differ, ``keep`` is not in ``(0, 1]``, or the criterion is unknown.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share above 0, at most 1, got {keep}")
    if criterion not in ("variance", "singular_values"):
        raise ValueError(f"criterion: expected variance or singular_values, got {criterion!r}")
    x, y = _pair(x, y)
    find = leading_basis if criterion == "variance" else _leading_as_is
    (qx, kept_x), (qy, kept_y) = find(x, keep), find(y, keep)
    rho = jnp.linalg.svd(gram(qx, qy), compute_uv=False)
    return jnp.sum(rho) / jnp.minimum(kept_x, kept_y)


def leading_basis(x: jax.Array, keep: float) -> tuple[jax.Array, jax.Array]:
    """Leading left singular vectors of centered columns, that hold a share of the variance.

    Args:
      x: ``[n, p]``, float32 or float64.
      keep: The share.

    Returns:
      ``[n, min(n, p)]``, orthonormal columns and 0 for those not kept, and the number of kept ones.
    """
    centered = centered_columns(x)[0]
    u, s, _ = jnp.linalg.svd(centered / binary_scale(centered), full_matrices=False)
    shares = jnp.square(s) / jnp.sum(jnp.square(s))
    kept = (jnp.cumsum(shares) - shares < keep) & (s > max(x.shape) * jnp.finfo(s.dtype).eps * s[0])
    return jnp.where(kept[None], u, 0), jnp.sum(kept.astype(u.dtype))


def _leading_as_is(x: jax.Array, keep: float) -> tuple[jax.Array, jax.Array]:
    u, s, _ = jnp.linalg.svd(x / binary_scale(x), full_matrices=False)
    kept = jnp.cumsum(s) / jnp.sum(s) < keep
    return whitened_columns(jnp.where(kept[None], u * s[None], 0))[0], jnp.sum(kept.astype(u.dtype))


def pwcca(x: jax.Array, y: jax.Array) -> jax.Array:
    """Projection-weighted CCA (arXiv 1806.05759, section 3): correlations weighted by what variates hold of ``x``.

    The weight of a variate is the sum over columns of the magnitude of its inner product with the centered column, so
    that large columns weigh more.  It is not symmetric.

    Args:
      x: ``[n, p]``, floating point.
      y: ``[n, q]``, of the same examples.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: The numbers of examples differ, or are no more than that of columns.
    """
    x, y = _pair(x, y)
    found = cca(x, y)
    centered = centered_columns(x)[0]
    held = gram(times(centered, found.wx), centered / binary_scale(centered))
    weights = jnp.sum(jnp.abs(held), axis=1)
    return jnp.sum(weights * found.rho) / jnp.sum(weights)


def procrustes_similarity(x: jax.Array, y: jax.Array) -> jax.Array:
    """Nuclear norm of ``x^T y``, of centered columns scaled to Frobenius norm 1 (arXiv 2108.01661).

    The squared distance that the best orthogonal map leaves is ``2 - 2`` times it.

    Args:
      x: ``[n, p]``, floating point.
      y: ``[n, q]``, of the same examples.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: The numbers of examples differ.
    """
    x, y = (unit_norm(a) for a in _pair(x, y))
    return jnp.sum(jnp.linalg.svd(gram(x, y), compute_uv=False))


def linear_regression_r2(x: jax.Array, y: jax.Array) -> jax.Array:
    """The share of the variance of all columns of ``x`` that a linear map of ``y`` predicts, with intercept.

    ``||Q^T x||_F^2 / ||x||_F^2`` of centered columns, with ``Q`` an orthonormal basis of those of ``y``
    (arXiv 1905.00414, equation 6).

    Args:
      x: ``[n, p]``, floating point.
      y: ``[n, q]``, of the same examples.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: The numbers of examples differ, or are no more than the columns of ``y``, which then predict all.
    """
    x, y = _pair(x, y)
    if y.shape[0] <= y.shape[1]:
        raise ValueError(f"y: expected more examples than columns, for otherwise they predict all; got {y.shape}")
    return jnp.sum(jnp.square(gram(whitened_columns(y)[0], unit_norm(x))))


def unit_norm(x: jax.Array) -> jax.Array:
    """Returns centered columns ``[n, p]`` scaled to a Frobenius norm of 1."""
    centered = centered_columns(x)[0]
    centered = centered / binary_scale(centered)
    return centered / jnp.sqrt(jnp.sum(jnp.square(centered)))


def _pair(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x, y: expected [n, p] and [n, q] of the same examples, got {x.shape} and {y.shape}")
    dtype = working_dtype(x, y)
    return x.astype(dtype), y.astype(dtype)
