"""Canonical correlation analysis (Hotelling, "Relations between two sets of variates", Biometrika 28, 1936)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix, check_square
from subspace_jax.linalg.centering import centered_columns
from subspace_jax.linalg.products import gram, nan_for_infinite, times
from subspace_jax.linalg.scaling import binary_scale
from subspace_jax.linalg.svd import canonical_signs

_thin_svd = functools.partial(jnp.linalg.svd, full_matrices=False)


class CCAResult(NamedTuple):
    """Canonical correlations of two sets of variables, and the maps to the canonical variates.

    Attributes:
      rho: Canonical correlations ``[k]``, descending, in ``[0, 1]``.
      wx: ``[p, k]``; the variates of ``x`` are ``(x - mean_x) @ wx``, with unit variance where ``eps`` is 0.
      wy: ``[q, k]``, likewise.
      mean_x: ``[p]``; zeros where only covariances are known.
      mean_y: ``[q]``.
    """

    rho: jax.Array
    wx: jax.Array
    wy: jax.Array
    mean_x: jax.Array
    mean_y: jax.Array


def cca(x: jax.Array, y: jax.Array, k: int | None = None, *, eps: float = 0.0) -> CCAResult:
    """Canonical correlations by thin QR of the centered columns and SVDs of the triangular factors.

    Nothing is squared, so correlations are right to the machine precision times the condition number.  Directions in
    which the columns of a side are linearly dependent, up to rounding, are dropped: their weights are 0, and so are the
    last correlations.  Costs ``n (p^2 + q^2)`` operations.  Large factorizations take minutes to compile for an
    accelerator, and the rows are gathered on a device: see :func:`cca_from_covariance` for many examples.

    Args:
      x: ``[n, p]``, float32 or float64, example by example with ``y``.
      y: ``[n, q]``, in the dtype of ``x``.
      k: Number of correlations, static; all ``min(n, p, q)`` by default.
      eps: Ridge added to the eigenvalues of both covariances (of ``1 / (n - 1)``), in the squared units of the columns;
        a Python number.

    Returns:
      The correlations, the maps and the means; NaN where the input is not finite.

    Raises:
      ValueError: The numbers of examples differ, there is no more of them than columns and ``eps`` is 0 (every
        correlation would be 1), ``k`` is out of range, or ``eps`` is negative.
      TypeError: The arrays are not both float32 or both float64.
    """
    for name, a in (("x", x), ("y", y)):
        check_matrix(name, a)
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x, y: expected [n, p] and [n, q] of the same examples, got {x.shape} and {y.shape}")
    _check_settings(x, y, k, eps, min(*x.shape, y.shape[1]))
    n, width = x.shape[0], max(x.shape[1], y.shape[1])
    if n <= width and eps == 0:
        raise ValueError(
            f"x, y: expected more examples than columns, for otherwise all correlations are 1; got {n} examples of "
            f"{width} columns; eps > 0 shrinks them instead"
        )
    (qx, tx, mean_x), (qy, ty, mean_y) = (_whitened(a, eps) for a in (x, y))
    return _of_whitened(gram(qx, qy), tx, ty, mean_x, mean_y, k)


def cca_from_covariance(
    cxx: jax.Array, cxy: jax.Array, cyy: jax.Array, k: int | None = None, *, eps: float = 0.0
) -> CCAResult:
    """:func:`cca` from covariances, which sum over batches and devices.

    Precision is that of squares: directions with less than the machine precision times ``p`` of the largest variance
    (of columns of unit variance, where ``eps`` is 0) count as dependent.

    Args:
      cxx: Covariance ``[p, p]`` of the first variables, float32 or float64, of ``1 / (n - 1)`` for unit sample
        variances.
      cxy: Covariance ``[p, q]`` of the first with the second.
      cyy: Covariance ``[q, q]`` of the second.
      k: Number of correlations, static; all ``min(p, q)`` by default.
      eps: See :func:`cca`.

    Returns:
      See :func:`cca`; the means are zeros.

    Raises:
      ValueError: Shapes do not match, ``k`` is out of range, or ``eps`` is negative.
      TypeError: The arrays are not all float32 or all float64.
    """
    check_square("cxx", cxx)
    check_square("cyy", cyy)
    check_matrix("cxy", cxy)
    if cxx.ndim != 2 or cyy.ndim != 2 or cxy.shape != (cxx.shape[0], cyy.shape[0]):
        raise ValueError(
            f"cxx, cxy, cyy: expected [p, p], [p, q] and [q, q], got {cxx.shape}, {cxy.shape} and {cyy.shape}"
        )
    _check_settings(cxx, cyy, k, eps, min(cxy.shape))
    if cxy.dtype != cxx.dtype:
        raise TypeError(f"cxy: expected the dtype of cxx, {cxx.dtype}, got {cxy.dtype}")
    tx, ty = (_inverse_root(c, eps) for c in (cxx, cyy))
    means = (jnp.zeros_like(c, shape=c.shape[0]) for c in (cxx, cyy))
    return _of_whitened(times(gram(tx, cxy), ty), tx, ty, *means, k)


def _check_settings(x: jax.Array, y: jax.Array, k: int | None, eps: float, largest: int) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"x, y: expected one dtype, got {x.dtype} and {y.dtype}")
    if k is not None and not 1 <= k <= largest:
        raise ValueError(f"k: expected 1 to {largest}, the number of correlations, got {k}")
    if not eps >= 0:
        raise ValueError(f"eps: expected 0 or more, got {eps}")


def _whitened(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``z`` with columns of length 1 (less by a ridge), ``t`` with ``z sqrt(n - 1) = centered(x) t``, the mean.

    Without a ridge the result does not depend on the columns' units, and they are brought to one size first.
    """
    centered, mean = centered_columns(x)
    scale = jnp.broadcast_to(binary_scale(centered, 0 if eps == 0 else None), (1, x.shape[1]))
    root = jnp.sqrt(jnp.asarray(max(x.shape[0] - 1, 1), x.dtype))
    q, r = jnp.linalg.qr(nan_for_infinite(centered / scale))
    u, s, vt = _thin_svd(r)
    s = s / root
    weights = _inverse_sqrt(s, jnp.square(s), eps, scale, max(x.shape))
    return times(q, u) * (s * weights)[None], vt.T * weights[None] / scale.T, mean


def _inverse_root(c: jax.Array, eps: float) -> jax.Array:
    """Returns ``t [p, p]`` for which ``t^T (c + eps) t`` is the identity, but for dropped columns."""
    variances = jnp.diagonal(c)[None]
    scale = jnp.sqrt(variances if eps == 0 else jnp.max(variances, keepdims=True))
    scale = jnp.broadcast_to(jnp.where(scale > 0, scale, 1), variances.shape)
    values, vectors = jnp.linalg.eigh(nan_for_infinite(c / scale / scale.T))
    weights = _inverse_sqrt(values, values, eps, scale, c.shape[0])
    return vectors * weights[None] / scale.T


def _inverse_sqrt(size: jax.Array, variances: jax.Array, eps: float, scale: jax.Array, count: int) -> jax.Array:
    """``1 / sqrt(variances + eps)`` in scaled units; 0 where a size is one of rounding beside the largest."""
    # Where eps counts, all columns have one scale.
    ridge = eps / jnp.square(scale[0, 0]) if eps else jnp.zeros_like(scale[0, 0])
    is_rounding = size <= count * jnp.finfo(size.dtype).eps * jnp.max(size)
    return jnp.where(is_rounding, 0, 1 / jnp.sqrt(jnp.where(is_rounding, 1, variances + ridge)))


def _of_whitened(cross, tx, ty, mean_x, mean_y, k) -> CCAResult:
    u, rho, vt = _thin_svd(nan_for_infinite(cross))
    wx, wy = times(tx, u[:, :k]), times(ty, vt[:k].T)
    signs = canonical_signs(wx)[None]
    return CCAResult(jnp.clip(rho[:k], 0, 1), wx * signs, wy * signs, mean_x, mean_y)
