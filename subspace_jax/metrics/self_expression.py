"""Scores of coefficients of self-expression, and of subspaces that a clustering has found, against true ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from subspace_jax import linalg
from subspace_jax.linalg import SparseRows

_TINY = 1e-10


class SubspaceMatch(NamedTuple):
    """A matching of found subspaces to true ones.

    Attributes:
      order: ``[k]``: found subspace ``order[i]`` is matched to true subspace ``i``.
      errors: ``[k]``, distances of their projectors; the largest is the recovery error.
    """

    order: np.ndarray
    errors: np.ndarray


def subspace_preserving_error(c: jax.Array | SparseRows, labels: jax.Array) -> jax.Array:
    """Mean share of a row's coefficients, in magnitude, that belong to rows of other labels.

    Args:
      c: ``[n, n]`` or :class:`subspace_jax.linalg.SparseRows`.
      labels: ``[n]`` integers.

    Returns:
      A scalar between 0 and 1; 0 where no row is represented by one of another label.

    Raises:
      ValueError: The shapes do not match.
    """
    size, other = _checked(c, labels)
    wrong = jnp.sum(jnp.where(other, size, 0), axis=1)
    return jnp.mean(wrong / (jnp.sum(size, axis=1) + _TINY))


def connectivity(c: jax.Array | SparseRows, labels: jax.Array) -> jax.Array:
    """Least second eigenvalue of the normalized Laplacian of the affinity within a class (algebraic connectivity).

    The affinity is ``(|R| + |R|^T) / 2``, but for its diagonal, with the rows ``R`` of ``c`` divided by their lengths.
    All classes are one eigenproblem, of the affinity without entries between classes: it has an eigenvalue 0 for each
    class, and the next one is the least of the second ones.

    Args:
      c: ``[n, n]`` or :class:`subspace_jax.linalg.SparseRows`.
      labels: ``[n]`` integers, values known (not traced).

    Returns:
      A scalar, 0 where the graph of a class has several parts.

    Raises:
      ValueError: The shapes do not match, or every class has one example.
    """
    size, other = _checked(c, labels)
    n, classes = labels.shape[0], len(np.unique(np.asarray(labels)))
    if classes == n:
        raise ValueError(f"labels: expected a class of two examples or more, got {n} classes of one")
    sparse = isinstance(c, SparseRows)
    row = jnp.arange(n, dtype=jnp.int32)
    own = (c.idx if sparse else row[None]) == row[:, None]
    half = size / jnp.maximum(jnp.linalg.norm(size, axis=1, keepdims=True), _TINY) / 2
    half = jnp.where(other | own, 0, half)
    product = linalg.affinity_product(SparseRows(c.idx, half) if sparse else half + half.T)
    degrees = product(jnp.ones((n, 1), half.dtype))
    # A node without affinity is a part of its own.
    alone = degrees == 0
    scale = jnp.where(alone, 0, jax.lax.rsqrt(jnp.where(alone, 1, degrees)))
    if sparse:
        key = jax.random.key(0)
        found = linalg.top_eigenpairs(
            key, lambda v: scale * product(scale * v) + jnp.where(alone, v, 0), n, classes + 1, dtype=half.dtype
        )
        return 1 - found.values[-1]
    matrix = scale * (half + half.T) * scale.T + jnp.diag(alone[:, 0].astype(half.dtype))
    return 1 - jnp.linalg.eigvalsh(matrix)[-classes - 1]


def match_subspaces(found: jax.Array, true: jax.Array) -> SubspaceMatch:
    """Matches subspaces one to one, so that the distances of their projectors are least in sum.

    Args:
      found: Orthonormal bases ``[k, n, p]``.
      true: Orthonormal bases ``[k, n, q]``.

    Returns:
      The matching, and its distances ``|P - Q|_F``.

    Raises:
      ValueError: The shapes do not match.
    """
    if found.ndim != 3 or true.ndim != 3 or found.shape[:2] != true.shape[:2]:
        raise ValueError(f"found, true: expected bases [k, n, p] and [k, n, q], got {found.shape} and {true.shape}")
    distances = np.asarray(linalg.projector_distance(true[:, None], found[None]), np.float64)
    rows, order = linear_sum_assignment(distances)
    return SubspaceMatch(order, distances[rows, order])


def _checked(c: jax.Array | SparseRows, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Magnitudes of the coefficients, and which of them are of another label, ``[n, s]`` or ``[n, n]``."""
    values = c.val if isinstance(c, SparseRows) else c
    n = values.shape[0]
    if values.ndim != 2 or (not isinstance(c, SparseRows) and values.shape[1] != n):
        raise ValueError(f"c: expected coefficients [n, n], got shape {values.shape}")
    if labels.shape != (n,):
        raise ValueError(f"labels: expected one of each row, [{n}], got shape {list(labels.shape)}")
    labels = jnp.asarray(labels)
    of_columns = labels[c.idx] if isinstance(c, SparseRows) else labels[None]
    return jnp.abs(values), of_columns != labels[:, None]
