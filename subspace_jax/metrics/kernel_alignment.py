"""Dependence of two sets of features by their kernels: HSIC, and centered kernel alignment (CKA).

Biased CKA of independent features is far above 0 where there are few examples for the width; the debiased one is 0 on
average.
"""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import binary_scale, centered_columns, gram, pairwise_sq_distances, times, working_dtype


def hsic(k: jax.Array, l: jax.Array) -> jax.Array:
    """Biased estimate ``tr(K H L H) / (n - 1)^2`` of the Hilbert-Schmidt independence criterion, ``H = I - 1 1^T / n``.

    Gretton, Bousquet, Smola, Schölkopf, "Measuring Statistical Dependence with Hilbert-Schmidt Norms", 2005.

    Args:
      k: Gram matrix ``[n, n]`` of one set of features, floating point.
      l: Gram matrix ``[n, n]`` of the other, of the same examples.  Neither needs to be symmetric.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: They are not square, of one size, of two or more examples.
    """
    k, l = _kernels(k, l, 2)
    return _biased(k, l) / (k.shape[0] - 1) ** 2


def unbiased_hsic(k: jax.Array, l: jax.Array) -> jax.Array:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al., JMLR 13, 2012, equation 5).

    With ``K~`` and ``L~`` the matrices without their diagonals, ``[tr(K~ L~) + 1'K~1 1'L~1 / ((n - 1)(n - 2)) -
    2 / (n - 2) 1'K~ L~1] / (n (n - 3))``.

    Args:
      k: Gram matrix ``[n, n]`` of one set of features, floating point.
      l: Gram matrix ``[n, n]`` of the other, of the same examples.  Neither needs to be symmetric.

    Returns:
      A scalar, float32 or wider; it may be negative.

    Raises:
      ValueError: They are not square, of one size, of four or more examples.
    """
    return _unbiased(*_kernels(k, l, 4))


def kernel_cka(k: jax.Array, l: jax.Array, debiased: bool = False) -> jax.Array:
    """Centered kernel alignment ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` (arXiv 1905.00414, equation 4).

    Args:
      k: Gram matrix ``[n, n]`` of one set of features, floating point.
      l: Gram matrix ``[n, n]`` of the other, of the same examples.
      debiased: Whether each criterion is :func:`unbiased_hsic`.

    Returns:
      A scalar, float32 or wider: in ``[0, 1]``, or at most 1 where debiased.  NaN where a kernel is constant.

    Raises:
      ValueError: They are not square, of one size, of two or more examples; four where debiased.
    """
    k, l = _kernels(k, l, 4 if debiased else 2)
    k, l = k / binary_scale(k), l / binary_scale(l)
    criterion = _unbiased if debiased else _biased
    return criterion(k, l) / jnp.sqrt(criterion(k, k)) / jnp.sqrt(criterion(l, l))


def linear_cka(x: jax.Array, y: jax.Array, debiased: bool = False) -> jax.Array:
    """:func:`kernel_cka` of the linear kernels ``x x^T`` and ``y y^T`` (arXiv 1905.00414, equation 5).

    ``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of centered columns.  No array is larger than the smaller of
    ``[n, n]`` and the product of the widths; columns sharded over examples need one sum over devices.

    Args:
      x: ``[n, p]``, floating point.
      y: ``[n, q]``, of the same examples.
      debiased: See :func:`kernel_cka`.

    Returns:
      See :func:`kernel_cka`; NaN where a side is constant.

    Raises:
      ValueError: The numbers of examples differ, or there are fewer than two; four where debiased.
    """
    least = 4 if debiased else 2
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or x.shape[0] < least:
        raise ValueError(
            f"x, y: expected [n, p] and [n, q] of the same {least} or more examples, got {x.shape} and {y.shape}"
        )
    x, y = _unit_centered(x, y)
    criterion = unbiased_of_features if debiased else biased_of_features
    return criterion(x, y) / jnp.sqrt(criterion(x, x)) / jnp.sqrt(criterion(y, y))


def rbf_kernel(x: jax.Array, fraction: float = 1.0) -> jax.Array:
    """The Gram matrix ``exp(-||a - b||^2 / (2 sigma^2))``, ``sigma`` a fraction of the median distance of two examples.

    Its width so follows the features' scale (arXiv 1905.00414, section 4).

    Args:
      x: ``[n, p]``, floating point.
      fraction: The fraction.

    Returns:
      ``[n, n]``, float32 or wider.

    Raises:
      ValueError: There are fewer than two examples, or ``fraction`` is not positive.
    """
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"x: expected [n, p] of two or more examples, got {x.shape}")
    if not fraction > 0:
        raise ValueError(f"fraction: expected more than 0, got {fraction}")
    x = x.astype(working_dtype(x))
    x = x / binary_scale(x)
    squares = pairwise_sq_distances(*[centered_columns(x)[0]] * 2)
    pairs = jnp.triu_indices(x.shape[0], 1)
    median = jnp.median(jnp.sqrt(squares[pairs]))
    return jnp.exp(-squares / (2 * jnp.square(jnp.asarray(fraction, x.dtype) * median)))


def _kernels(k: jax.Array, l: jax.Array, least: int) -> tuple[jax.Array, jax.Array]:
    if k.ndim != 2 or k.shape[0] != k.shape[1] or k.shape != l.shape or k.shape[0] < least:
        raise ValueError(f"k, l: expected [n, n] each, n at least {least}, got {k.shape} and {l.shape}")
    dtype = working_dtype(k, l)
    return k.astype(dtype), l.astype(dtype)


def _biased(k: jax.Array, l: jax.Array) -> jax.Array:
    # Of K H L H = (H K H)(H L H): centering both keeps the digits that a large mean would take.
    def centered(m):
        return centered_columns(centered_columns(m)[0].T)[0].T

    return jnp.sum(centered(k) * centered(l).T)


def _unbiased(k: jax.Array, l: jax.Array) -> jax.Array:
    n = k.shape[0]
    k, l = (jnp.where(jnp.eye(n, dtype=bool), 0, m) for m in (k, l))
    trace, both = jnp.sum(k * l.T), jnp.sum(k) * jnp.sum(l)
    through = jnp.sum(jnp.sum(k, axis=0) * jnp.sum(l, axis=1))
    return (trace + both / ((n - 1) * (n - 2)) - 2 / (n - 2) * through) / (n * (n - 3))


def _unit_centered(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = working_dtype(x, y)

    def of_one(a):
        a = centered_columns(a.astype(dtype))[0]
        return a / binary_scale(a)

    return of_one(x), of_one(y)


def biased_of_features(x: jax.Array, y: jax.Array) -> jax.Array:
    """``||x^T y||_F^2 = tr(x x^T y y^T)`` of centered columns, by the smaller of the two arrays."""
    if x.shape[0] ** 2 < x.shape[1] * y.shape[1]:
        return jnp.sum(times(x, x.T) * times(y, y.T))
    return jnp.sum(jnp.square(gram(x, y)))


def unbiased_of_features(x: jax.Array, y: jax.Array) -> jax.Array:
    """:func:`unbiased_hsic` of the linear kernels of centered columns."""
    # Rows of a centered kernel sum to 0, so those without the diagonal sum to minus the diagonal.
    n = x.shape[0]
    dx, dy = jnp.sum(jnp.square(x), axis=1), jnp.sum(jnp.square(y), axis=1)
    through = jnp.sum(dx * dy)
    both = jnp.sum(dx) * jnp.sum(dy)
    trace = biased_of_features(x, y) - through
    return (trace + both / ((n - 1) * (n - 2)) - 2 / (n - 2) * through) / (n * (n - 3))
