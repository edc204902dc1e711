"""The orthogonal map that aligns two sets of vectors."""

import jax

from subspace_jax.linalg._checks import check_matrix
from subspace_jax.linalg.products import gram, nan_for_infinite, times


def orthogonal_procrustes(x: jax.Array, y: jax.Array) -> jax.Array:
    """The matrix with orthonormal columns or rows that maps ``x`` nearest to ``y`` (Schönemann, Psychometrika 1966).

    The polar factor ``U V^T`` of ``x^T y``.  Where the widths are equal it minimizes ``||x Q - y||``; otherwise it
    maximizes the inner product of ``x Q`` and ``y``.

    Args:
      x: ``[examples, n]``, float32 or float64.
      y: ``[examples, m]``, example by example with ``x``.

    Returns:
      ``[n, m]``.

    Raises:
      ValueError: Shapes do not match.
      TypeError: A dtype is neither float32 nor float64.
    """
    check_matrix("x", x)
    check_matrix("y", y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x, y: expected pairs [examples, n] and [examples, m], got {x.shape} and {y.shape}")
    u, _, vt = jax.numpy.linalg.svd(nan_for_infinite(gram(x, y)), full_matrices=False)
    return times(u, vt)
