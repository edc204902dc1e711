"""The variant with a kernel: the distance, in feature space, from the span of kernel principal components."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg

_ROWS_AT_A_TIME = 1024


class KernelSubspace(NamedTuple):
    """Kernel principal components of rows, with a Gaussian kernel.

    Attributes:
      center: Mean of each column, ``[d]``.
      scale: Population standard deviation of each column, ``[d]``.
      rows: The standardized rows, ``[n, d]``.
      duals: Coefficients of the components, ``[n, rank]``.
      kernel_means: Mean of each row of the kernel matrix, ``[n]``.
      gamma: Of the kernel ``exp(-gamma ||x - y||^2)``.
    """

    center: jax.Array
    scale: jax.Array
    rows: jax.Array
    duals: jax.Array
    kernel_means: jax.Array
    gamma: jax.Array


def fit_kernel_pca(features: jax.Array | np.ndarray, rank: int, *, gamma: float | None = None) -> KernelSubspace:
    """Fits kernel principal components; holds a matrix ``[n, n]``, so take a sample of some thousand rows.

    Args:
      features: ``[n, d]``, floating point, finite; standardized by column.
      rank: Number of components, 1 to ``n - 1``.
      gamma: Of the kernel; ``1 / d`` by default.

    Returns:
      The components, float32, or float64 if the features are.

    Raises:
      ValueError: An option is out of range, or the features are not finite or all equal.
    """
    x = np.asarray(features)
    if x.ndim != 2 or len(x) < 2 or not np.all(np.isfinite(np.asarray(x, np.float64))):
        raise ValueError(f"features: expected at least 2 finite rows [n, d], got shape {list(x.shape)}")
    n, d = x.shape
    if not 1 <= rank <= n - 1:
        raise ValueError(f"rank: expected 1 to {n - 1}, below the number of rows, got {rank}")
    gamma = 1 / d if gamma is None else gamma
    if not gamma > 0:
        raise ValueError(f"gamma: expected a positive number, got {gamma}")
    dtype = linalg.working_dtype(x)
    x = np.asarray(x, np.float64)
    center, scale = x.mean(0), x.std(0)
    if not np.any(scale > 0):
        raise ValueError(f"features: expected rows that differ, got {n} equal ones")
    scale = np.where(scale > 0, scale, 1)
    x = (x - center) / scale
    squares = np.sum(x * x, axis=1)
    kernel = np.exp(-gamma * np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0))
    means = kernel.mean(1)
    values, vectors = np.linalg.eigh(kernel - means[None] - means[:, None] + means.mean())
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    kept = values > values[0] * n * np.finfo(np.float64).eps
    duals = np.where(kept, vectors / np.sqrt(np.where(kept, values, 1)), 0)
    return KernelSubspace(*(jnp.asarray(a, dtype) for a in (center, scale, x, duals, means, gamma)))


def kernel_residual_score(subspace: KernelSubspace, x: jax.Array) -> jax.Array:
    """Anomaly scores: ``k(x, x)``, which is 1, less the squared coordinates, and at least 0.

    Args:
      subspace: From :func:`fit_kernel_pca`.
      x: ``[m, d]``, floating point.

    Returns:
      ``[m]``, float32 or float64; a kernel matrix of 1,024 rows is in memory at a time.

    Raises:
      ValueError: The width is not that of the fitted rows.
    """
    d = subspace.rows.shape[1]
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"x: expected rows [m, {d}], the width of the fitted ones, got shape {list(x.shape)}")
    x = (x.astype(linalg.working_dtype(x, subspace.rows)) - subspace.center[None]) / subspace.scale[None]

    def of_rows(row: jax.Array) -> jax.Array:
        kernel = jnp.exp(-subspace.gamma * jnp.sum(jnp.square(subspace.rows - row[None]), axis=1))
        centered = kernel - jnp.mean(kernel) - subspace.kernel_means + jnp.mean(subspace.kernel_means)
        z = linalg.times(centered[None], subspace.duals)
        return jnp.maximum(1 - jnp.sum(jnp.square(z)), 0)

    return jax.lax.map(of_rows, x, batch_size=_ROWS_AT_A_TIME)
