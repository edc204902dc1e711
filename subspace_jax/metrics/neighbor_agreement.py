"""Whether two feature spaces have the same neighbourhoods: which examples are nearest to each, by their cosine.

The measures of "The Platonic Representation Hypothesis" (arXiv 2405.07987, section 3 and appendix A).  All of them
search in blocks and keep the indices of ``k`` neighbours of each example: no matrix of all pairs is made.
"""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import nearest_rows, unit_vectors
from subspace_jax.metrics._pairs import checked_pair


def mutual_knn(x: jax.Array, y: jax.Array, *, k: int = 10) -> jax.Array:
    """Mean share of the ``k`` nearest examples that both spaces have in common.

    1 for equal neighbourhoods, about ``k / (n - 1)`` for independent features.  An example is no neighbour of itself.
    Vectors are compared by their cosines, and may be of any length but 0.

    Args:
      x: ``[n, p]``, floating point.
      y: Features of the same examples, ``[n, q]``.
      k: Number of neighbours, below ``n``.

    Returns:
      A scalar between 0 and 1, float32 or wider.

    Raises:
      ValueError: Shapes do not match, ``k`` is not between 1 and ``n - 1``, or a concrete array is not finite.
      TypeError: Features are not floating point.
    """
    of_x, of_y, dtype = _both(x, y, k)
    return jnp.mean(_among(of_x, of_y).astype(dtype))


def cycle_knn(x: jax.Array, y: jax.Array, *, k: int = 10) -> jax.Array:
    """Share of examples that are a neighbour in ``x`` of one of their own neighbours in ``y``.

    Args:
      x: See :func:`mutual_knn`, as for the other arguments.
      y: ``[n, q]``.
      k: Number of neighbours.

    Returns:
      A scalar between 0 and 1, float32 or wider.

    Raises:
      ValueError: As :func:`mutual_knn`.
      TypeError: As :func:`mutual_knn`.
    """
    of_x, of_y, dtype = _both(x, y, k)
    own = jnp.arange(of_x.shape[0], dtype=of_x.dtype)
    # One column of neighbours at a time, [n, k] each.
    returns = jax.lax.map(lambda column: jnp.any(of_x[column] == own[:, None], axis=1), of_y.T)
    return jnp.mean(jnp.any(returns, axis=0).astype(dtype))


def lcs_knn(x: jax.Array, y: jax.Array, *, k: int = 10) -> jax.Array:
    """Mean length of the longest common subsequence of an example's two lists of neighbours, the nearest first.

    Args:
      x: See :func:`mutual_knn`, as for the other arguments.
      y: ``[n, q]``.
      k: Number of neighbours.

    Returns:
      A scalar between 0 and ``k``, float32 or wider.

    Raises:
      ValueError: As :func:`mutual_knn`.
      TypeError: As :func:`mutual_knn`.
    """
    of_x, of_y, dtype = _both(x, y, k)

    def add(lengths, column):
        """Extends the lists of ``x`` by one neighbour: ``lengths[:, j]`` is that with the first j of ``y``."""
        matched = jnp.where(of_y == column[:, None], lengths[:, :-1] + 1, lengths[:, 1:])
        # The length with j neighbours of y is at least that with fewer.
        longest = jax.lax.cummax(matched, axis=1)
        return jnp.concatenate([lengths[:, :1], longest], axis=1), None

    start = jnp.zeros((of_x.shape[0], k + 1), jnp.int32)
    lengths, _ = jax.lax.scan(add, start, of_x.T)
    return jnp.mean(lengths[:, -1].astype(dtype))


def cknna(x: jax.Array, y: jax.Array, *, k: int = 10, biased: bool = False) -> jax.Array:
    """Kernel alignment of neighbours: CKA of cosines of which only those between neighbours are kept.

    A cosine is kept where one example is among the nearest of the other in both spaces; the two norms keep those of
    their own space.  As ``k`` grows to ``n - 1`` this becomes the unbiased CKA.

    Args:
      x: See :func:`mutual_knn`, as for the other arguments.
      y: ``[n, q]``.
      k: Number of neighbours, at least 2.
      biased: Whether to use the biased estimator; an example is then its own first neighbour.

    Returns:
      A scalar, float32 or wider; NaN where the unbiased estimate of a squared norm is negative.  The denominator has
      1e-6 added.

    Raises:
      ValueError: As :func:`mutual_knn`; or ``k`` is below 2, or there are fewer than 4 examples.
      TypeError: As :func:`mutual_knn`.
    """
    x, y = checked_pair(x, y, 4)
    # An example that is its own neighbour leaves room for one more.
    if not 2 <= k < x.shape[0] + biased:
        raise ValueError(f"k: expected 2 to {x.shape[0] - 1 + biased} neighbours of {x.shape[0]} examples, got {k}")
    x, y = unit_vectors(x), unit_vectors(y)
    of_x, of_y = (_neighbors(z, k, itself=biased) for z in (x, y))

    def cosines(z, index):
        column = jax.lax.map(lambda j: jnp.sum(z * z[j], axis=1), index.T)
        return column.T

    # Rows of the masked kernels, at the neighbours in x for the numerator.
    kept = _among(of_x, of_y)
    numerator = _masked_hsic(
        of_x, jnp.where(kept, cosines(x, of_x), 0), jnp.where(kept, cosines(y, of_x), 0), kept, biased
    )
    everywhere = jnp.ones_like(kept)
    norms = []
    for z, index in ((x, of_x), (y, of_y)):
        values = cosines(z, index)
        norms.append(_masked_hsic(index, values, values, everywhere, biased))
    return numerator / (jnp.sqrt(norms[0] * norms[1]) + 1e-6)


def clip_outliers(x: jax.Array, q: float = 0.95) -> jax.Array:
    """Clips entries to the magnitude of the ``q`` quantile of all magnitudes, the one at index ``int(q * size)``.

    A step before the measures of this module in arXiv 2405.07987: a few huge entries rule cosines otherwise.

    Args:
      x: Of any shape, floating point.
      q: The quantile, above 0 and at most 1; 1 clips nothing.

    Raises:
      ValueError: ``q`` is out of range, or ``x`` is empty.
    """
    if not 0 < q <= 1 or not x.size:
        raise ValueError(f"x, q: expected entries and a quantile above 0 and at most 1, got shape {x.shape} and {q}")
    if q == 1:
        return x
    limit = jnp.sort(jnp.abs(x).ravel())[int(q * x.size)]
    return jnp.clip(x, -limit, limit)


def _both(x, y, k):
    """Returns the neighbours of each example in both spaces, ``[n, k]``, and the dtype of results."""
    x, y = checked_pair(x, y, 2)
    if not 1 <= k < x.shape[0]:
        raise ValueError(f"k: expected 1 to {x.shape[0] - 1} neighbours of {x.shape[0]} examples, got {k}")
    return _neighbors(unit_vectors(x), k), _neighbors(unit_vectors(y), k), x.dtype


def _neighbors(x, k, itself=False):
    """Returns the nearest rows of each unit vector, ``[n, k]``; among unit vectors distances rank as cosines do."""
    return nearest_rows(x, x, k, exclude=None if itself else jnp.arange(x.shape[0]))[1]


def _among(index, others):
    """Whether each entry of ``index [n, k]`` is in the same row of ``others [n, k]``."""
    hits = jax.lax.map(lambda column: jnp.any(others == column[:, None], axis=1), index.T)
    return hits.T


def _masked_hsic(index, a, b, kept, biased):
    """The HSIC of two kernels that are 0 but for some entries of each row, and so are not symmetric.

    Args:
      index: Columns of the entries, ``[n, k]``.
      a: Entries of the first kernel, ``[n, k]``; 0 where not ``kept``.
      b: Entries of the second.
      kept: Which entries count, ``[n, k]``.
      biased: Whether the estimator is ``tr(A H B H)``, or the unbiased one of Song et al. (JMLR 2012).
    """
    n = float(index.shape[0])
    own = jnp.arange(index.shape[0], dtype=index.dtype)

    def returned(column):
        """Whether the row of each neighbour keeps the entry back."""
        return jnp.any((index[column] == own[:, None]) & kept[column], axis=1)

    # tr(A B) = sum_ij A_ij B_ji, where B is symmetric but for the mask: B_ji is B_ij where both entries are kept.
    back = jax.lax.map(returned, index.T).T
    trace = jnp.sum(jnp.where(back, a * b, 0))
    columns_a, columns_b = (jax.ops.segment_sum(z.ravel(), index.ravel(), index.shape[0]) for z in (a, b))
    rows_a, rows_b = jnp.sum(a, axis=1), jnp.sum(b, axis=1)
    ab, ba, sums = jnp.sum(columns_a * rows_b), jnp.sum(columns_b * rows_a), jnp.sum(a) * jnp.sum(b)
    if biased:
        return trace - (ab + ba) / n + sums / n**2
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * ab / (n - 2)) / (n * (n - 3))
