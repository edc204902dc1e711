"""Self-expression in closed form: least-squares (LSR) and low-rank (LRR) representation."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg.expression_rows import checked, from_blocks, without_own
from subspace_jax.linalg.products import nan_for_infinite, times
from subspace_jax.linalg.sparse_rows import SparseRows


def lsr(
    x: jax.Array,
    gamma: float = 10.0,
    *,
    zero_diagonal: bool = True,
    keep: int | None = None,
    block_size: int | None = None,
) -> jax.Array | SparseRows:
    """Least-squares representation: each row by all others, with a ridge penalty (Lu et al., ECCV 2012).

    Row ``i`` minimizes ``|x_i - c X|^2 + |c|^2 / gamma``, with ``c_i = 0`` or without that constraint.  With ``H =
    X (X^T X + I / gamma)^-1 X^T`` the solution is ``H``; with the constraint it is ``H_ij / (1 - H_ii)`` off the
    diagonal.  One SVD of ``x`` serves all rows, which are formed by blocks.

    Args:
      x: ``[n, features]``, floating point; rows of unit length as a rule.
      gamma: Weight of the data against the penalty.
      zero_diagonal: Whether a row may not represent itself.
      keep: Entries of each row to keep, those of largest magnitude; None for all.
      block_size: Rows at a time.

    Returns:
      Coefficients ``[n, n]``, or :class:`SparseRows` with ``keep``; float32 or wider.

    Raises:
      ValueError: ``x`` is no matrix or (where its values are known) not finite, or another argument is out of range.
      TypeError: ``x`` is not floating point.
    """
    x = checked(x)
    if not gamma > 0:
        raise ValueError(f"gamma: expected more than 0, got {gamma}")
    u, s = _left_vectors(x)
    share = jnp.square(s) / (jnp.square(s) + 1 / gamma)
    if not zero_diagonal:
        return _projected(u, share, None, keep, block_size)
    own = times(jnp.square(u), share[:, None])[:, 0]
    return _projected(u, share, 1 - own, keep, block_size)


def lrr(
    x: jax.Array, noise: float = 0.0, *, keep: int | None = None, block_size: int | None = None
) -> jax.Array | SparseRows:
    """Low-rank representation in closed form (Liu et al. 2013; Favaro, Vidal and Ravichandran, CVPR 2011).

    The minimizer of ``|C|_* + |X - C X|_F^2 / (2 noise)`` is ``U max(0, 1 - noise / s^2) U^T`` with the SVD ``X =
    U s V^T``; without noise that of ``|C|_*`` with ``X = C X`` is the projector ``U U^T`` (shape interaction matrix).

    Args:
      x: ``[n, features]``, floating point.
      noise: Weight of the nuclear norm against the error.
      keep: Entries of each row to keep, those of largest magnitude; None for all.
      block_size: Rows at a time.

    Returns:
      Coefficients ``[n, n]``, or :class:`SparseRows` with ``keep``; float32 or wider.

    Raises:
      ValueError: See :func:`lsr`.
      TypeError: See :func:`lsr`.
    """
    x = checked(x)
    if not noise >= 0:
        raise ValueError(f"noise: expected 0 or more, got {noise}")
    u, s = _left_vectors(x)
    # Directions that are rounding alone are none.
    real = s > max(x.shape) * jnp.finfo(x.dtype).eps * jnp.max(s)
    share = jnp.where(real, jnp.maximum(0, 1 - noise / jnp.square(jnp.where(real, s, 1))), 0)
    return _projected(u, share, None, keep, block_size)


def _left_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Left singular vectors ``[n, r]`` and singular values."""
    u, s, _ = jnp.linalg.svd(nan_for_infinite(x), full_matrices=False)
    return u, s


def _projected(u, share, divisor, keep, block_size):
    """Rows of ``u diag(share) u^T``; with ``divisor [n]``, divided by it and without the diagonal."""
    weighted = (u * share[None]).T

    def of_rows(own, at):
        rows = times(own, weighted)
        return rows if divisor is None else without_own(rows / divisor[at][:, None], at)

    return from_blocks(of_rows, u, keep, block_size)
