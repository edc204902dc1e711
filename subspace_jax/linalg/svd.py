"""Exact and randomized singular value decompositions with canonical signs."""

import functools

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix
from subspace_jax.linalg.orthonormal import orthonormal_columns
from subspace_jax.linalg.products import broadcast_leading, gram, nan_for_infinite, times
from subspace_jax.linalg.qr import positive_qr
from subspace_jax.linalg.stacks import of_each

_thin_svd = functools.partial(jnp.linalg.svd, full_matrices=False)


def canonical_signs(u: jax.Array) -> jax.Array:
    """Returns signs that make the entry of largest magnitude of every column positive.

    Multiply both the left and the right singular vectors by them.  The first of tied entries decides; ties up to
    rounding are decided by the rounding.

    Args:
      u: ``[..., n, k]``.

    Returns:
      ``[..., k]`` of 1 and -1, in the dtype of ``u``.
    """
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)[..., 0, :]
    return jnp.where(largest < 0, -1.0, 1.0).astype(u.dtype)


def canonical_svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin SVD ``x = u diag(s) vt`` with descending ``s`` and canonical signs.

    Singular vectors are unique for distinct singular values only; within a cluster compare projectors.  For set-up and
    references: a large SVD takes minutes to compile for an accelerator.

    Args:
      x: ``[..., m, n]``, float32 or float64.

    Returns:
      ``u [..., m, r]``, ``s [..., r]``, ``vt [..., r, n]`` with ``r = min(m, n)``; NaN if ``x`` is not finite.

    Raises:
      ValueError: ``x`` is no matrix.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_matrix("x", x)
    u, s, vt = of_each(_thin_svd, nan_for_infinite(x))
    signs = canonical_signs(u)
    return u * signs[..., None, :], s, vt * signs[..., :, None]


def product_svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin SVD of ``a b``, which is not formed: two orthonormal bases, and an SVD of the core between them.

    With ``a = q_a r_a`` and ``b^T = q_b r_b`` it is the SVD of ``r_a r_b^T``, at most ``k x k``.  Columns of ``a`` and
    rows of ``b`` may be dependent, or zero.  No reverse-mode derivative.

    Args:
      a: ``[..., m, k]``, float32 or float64.
      b: ``[..., k, n]``, with the leading axes and the dtype of ``a``.

    Returns:
      ``u [..., m, r]``, ``s [..., r]``, ``vt [..., r, n]`` with ``r = min(m, k, n)`` and canonical signs; the last
      values are zero up to rounding where the product has a lower rank.

    Raises:
      ValueError: The shapes do not match.
      TypeError: The arrays are not both float32 or both float64.
    """
    check_matrix("a", a)
    check_matrix("b", b)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a, b: expected [..., m, k] and [..., k, n], got {a.shape} and {b.shape}")
    if a.dtype != b.dtype:
        raise TypeError(f"b: expected the dtype of a, {a.dtype}, got {b.dtype}")
    # A factor that is wider than tall spans no more than the unit vectors, which need no basis.
    left, right = (orthonormal_columns(x) if x.shape[-2] > x.shape[-1] else None for x in (a, b.mT))
    inner = times(a if left is None else gram(left, a), b if right is None else times(b, right))
    u, s, vt = of_each(_thin_svd, nan_for_infinite(inner))
    u, vt = u if left is None else times(left, u), vt if right is None else times(vt, right.mT)
    signs = canonical_signs(u)
    return u * signs[..., None, :], s, vt * signs[..., :, None]


def randomized_svd(
    key: jax.Array, x: jax.Array, rank: int, *, oversample: int = 8, power_steps: int = 2
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leading singular triplets by a random sketch and power steps (Halko, Martinsson, Tropp, arXiv 0909.4061).

    With ``l = rank + oversample``, the expected spectral error of the result is at most ``1 +
    (1 + sqrt(rank / (oversample - 1)) + e sqrt(l (min(m, n) - rank)) / oversample) ** (1 / (2 power_steps + 1))``
    times the first dropped singular value (their corollary 10.10 for the sketch; theorem 9.3 adds the 1 for the
    truncation from ``l`` to ``rank``).  Costs ``2 (2 power_steps + 2) m n l`` operations.

    Args:
      key: Random key of the sketch.
      x: ``[..., m, n]``, float32 or float64.
      rank: Number of triplets, static.
      oversample: Further columns of the sketch, at least 2 for the bound.
      power_steps: Multiplications by ``x x^T``, each re-orthonormalized.

    Returns:
      ``u [..., m, rank]``, ``s [..., rank]``, ``vt [..., rank, n]``, canonical signs.

    Raises:
      ValueError: ``rank`` is below 1 or above ``min(m, n)``, the other arguments are negative, or ``x`` is no matrix.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_matrix("x", x)
    m, n = x.shape[-2:]
    _check_rank(rank, m, n)
    if oversample < 0 or power_steps < 0:
        raise ValueError(f"oversample, power_steps: expected 0 or more, got {oversample} and {power_steps}")
    width = min(rank + oversample, m, n)
    sketch = jax.random.normal(key, (*x.shape[:-2], n, width), x.dtype)
    return _from_range(x, _iterate(x, sketch, power_steps), rank)


def subspace_iteration(x: jax.Array, basis: jax.Array, steps: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leading singular triplets from a warm start: block power iteration with QR and a Rayleigh-Ritz step.

    The angle to the leading subspace shrinks by ``(s[rank] / s[rank - 1]) ** 2`` per step; a nearly converged basis
    needs one or two.

    Args:
      x: ``[..., m, n]``, float32 or float64.
      basis: Start for the left vectors, ``[..., m, rank]``, of full column rank.
      steps: Multiplications by ``x x^T``, at least 1.

    Returns:
      ``u [..., m, rank]``, ``s [..., rank]``, ``vt [..., rank, n]``, canonical signs.

    Raises:
      ValueError: Shapes do not match, or ``steps`` is below 1.
      TypeError: The arrays are not both float32 or both float64.
    """
    check_matrix("x", x)
    check_matrix("basis", basis)
    m, n = x.shape[-2:]
    if basis.shape[-2] != m:
        raise ValueError(f"basis: expected [..., {m}, rank] for x of shape {x.shape}, got {basis.shape}")
    _check_rank(basis.shape[-1], m, n)
    if basis.dtype != x.dtype:
        raise TypeError(f"basis: expected the dtype of x, {x.dtype}, got {basis.dtype}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    x, basis = broadcast_leading(x, basis)
    sketch = positive_qr(gram(x, basis))[0]
    return _from_range(x, _iterate(x, sketch, steps - 1), basis.shape[-1])


def _check_rank(rank: int, m: int, n: int) -> None:
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: expected 1 to {min(m, n)} for a {m} x {n} matrix, got {rank}")


def _iterate(x: jax.Array, right: jax.Array, steps: int) -> jax.Array:
    """Returns an orthonormal basis of the range of ``(x x^T)^steps x right``."""
    left = positive_qr(times(x, right))[0]
    for _ in range(steps):
        right = positive_qr(gram(x, left))[0]
        left = positive_qr(times(x, right))[0]
    return left


def _from_range(x: jax.Array, q: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, vt = of_each(_thin_svd, nan_for_infinite(gram(q, x)))
    u = times(q, u[..., :rank])
    signs = canonical_signs(u)
    return u * signs[..., None, :], s[..., :rank], vt[..., :rank, :] * signs[..., :, None]
