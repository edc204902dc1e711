"""Centred kernel alignment as a measure of two feature spaces of any width, without a matrix of all pairs."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import pairwise_sq_distances, times, working_dtype
from subspace_jax.metrics._pairs import checked_pair
from subspace_jax.metrics.kernel_alignment import biased_of_features, unbiased_of_features

KERNELS = ("linear", "rbf")
_PAIRS_AT_A_TIME = 2**22
_EXAMPLES_OF_A_MEDIAN = 2048


def cka(x: jax.Array, y: jax.Array, *, kernel: str = "linear", sigma: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """Centred kernel alignment ``tr(KHLH) / (sqrt(tr(KHKH) tr(LHLH)) + 1e-6)`` (arXiv 1905.00414, section 3).

    The form of arXiv 2405.07987, whose features are unit vectors: divide by lengths first to compare with it.  It is
    biased upwards, the more the fewer examples there are for their width; :func:`unbiased_cka` is not.

    Where there are more examples than features, the linear kernel costs ``n p q``; else, and for "rbf", kernels are
    computed twice, for blocks of rows.

    Args:
      x: ``[n, p]``, floating point.
      y: Features of the same examples, ``[n, q]``.
      kernel: "linear", or "rbf" for ``exp(-||u - v||^2 / (2 sigma^2))``.
      sigma: Width of the kernel "rbf": a number, or two for ``x`` and ``y``.

    Returns:
      A scalar between 0 and 1, float32 or wider.

    Raises:
      ValueError: Shapes do not match, there are fewer than 2 examples, the kernel is unknown, or a concrete array is
        not finite.
      TypeError: Features are not floating point.
    """
    return _ratio(*_hsics(x, y, kernel, sigma, unbiased=False))


def unbiased_cka(x: jax.Array, y: jax.Array, *, kernel: str = "linear", sigma: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """The same with the unbiased estimator of HSIC (Song et al., JMLR 2012): about 0 for independent features.

    Args:
      x: See :func:`cka`, as for the other arguments.
      y: ``[n, q]``.
      kernel: "linear" or "rbf".
      sigma: Width of the kernel "rbf".

    Returns:
      A scalar, at most 1 but for rounding, which may be negative, float32 or wider.

    Raises:
      ValueError: As :func:`cka`; or there are fewer than 4 examples.
      TypeError: As :func:`cka`.
    """
    return _ratio(*_hsics(x, y, kernel, sigma, unbiased=True))


def median_sigma(x: jax.Array) -> jax.Array:
    """Width of the kernel "rbf" whose square is the median of the non-zero squared distances of examples.

    Of an even number of distances the lower one, as in arXiv 2401.05224.  Of more than 2,048 examples as many are
    taken, evenly spaced.

    Args:
      x: ``[n, p]``, floating point.

    Returns:
      A scalar, float32 or wider; NaN where all examples are equal.

    Raises:
      ValueError: There are fewer than 2 examples.
    """
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"x: expected two examples [n, p] or more, got {x.shape}")
    x = x.astype(working_dtype(x))
    x = x[:: -(-x.shape[0] // _EXAMPLES_OF_A_MEDIAN)]
    # From the mean as the origin: distances come from inner products.
    x = x - jnp.mean(x, axis=0, keepdims=True)
    above = pairwise_sq_distances(x, x)[jnp.triu_indices(x.shape[0], 1)]
    count = jnp.sum(above > 0)
    ordered = jnp.sort(jnp.where(above > 0, above, jnp.inf))
    return jnp.where(count > 0, jnp.sqrt(ordered[(count - 1) // 2]), jnp.nan)


def _ratio(kl, kk, ll):
    return kl / (jnp.sqrt(kk * ll) + 1e-6)


def _hsics(x, y, kernel, sigma, *, unbiased):
    """Returns the HSIC of both kernels, and of each with itself."""
    x, y = checked_pair(x, y, 4 if unbiased else 2)
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    x, y = (z - jnp.mean(z, axis=0, keepdims=True) for z in (x, y))
    if kernel == "linear" and x.shape[0] > max(x.shape[1], y.shape[1]):
        criterion = unbiased_of_features if unbiased else biased_of_features
        return [criterion(a, b) for a, b in ((x, y), (x, x), (y, y))]
    sigmas = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), (2,))
    return _of_rows(x, y, kernel, sigmas, unbiased)


def _of_rows(x, y, kernel, sigmas, unbiased):
    """The same by rows of both kernels: their means in a first pass, products of what is left in a second one."""
    n = x.shape[0]
    rows = max(1, min(n, _PAIRS_AT_A_TIME // n))
    # Those of the unbiased estimator take the diagonal for 0 (Szekely and Rizzo 2014): then it is a plain mean product.
    per_row, per_all = (n - 2, (n - 1) * (n - 2)) if unbiased else (n, n * n)

    def row_of(z, sigma, i):
        if kernel == "linear":
            values = times(z[i][None], z.T)[0]
        else:
            values = jnp.exp(-pairwise_sq_distances(z[i][None], z)[0] / (2 * sigma**2))
        return jnp.where(jnp.arange(n) == i, 0, values) if unbiased else values

    def both(i):
        return row_of(x, sigmas[0], i), row_of(y, sigmas[1], i)

    sums = jax.lax.map(lambda i: [jnp.sum(row) for row in both(i)], jnp.arange(n), batch_size=rows)

    def products(i):
        left = []
        for row, total in zip(both(i), sums, strict=True):
            centred = row - (total + total[i]) / per_row + jnp.sum(total) / per_all
            left.append(jnp.where(jnp.arange(n) == i, 0, centred) if unbiased else centred)
        a, b = left
        return jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)

    found = jax.lax.map(products, jnp.arange(n), batch_size=rows)
    return [jnp.sum(f) / (n * (n - 3) if unbiased else 1) for f in found]
