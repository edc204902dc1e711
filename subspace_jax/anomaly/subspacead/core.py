"""The subspace of normal variation: moments in a stream, principal components, scores off the subspace."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import kernels, linalg

METHODS = ("reconstruction", "mahalanobis", "euclidean", "cosine")
_EPS = 1e-6
_COLUMNS = 32
_log = logging.getLogger(__name__)


class Moments(NamedTuple):
    """Weighted first and second moments of rows.

    Attributes:
      count: Sum of the weights, float32 or float64.
      mean: ``[d]``.
      m2: Sum ``[d, d]`` of the outer products of deviations from the mean.
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array


class PCASubspace(NamedTuple):
    """An affine subspace of normal variation.

    Attributes:
      mean: ``[d]``.
      components: Orthonormal columns ``[d, c]`` by descending variance, of which the first ``rank`` span the subspace.
      eigenvalues: Variances along all directions, ``[d]``, descending.
      rank: Dimensions of the subspace, int32; at most ``c``.
    """

    mean: jax.Array
    components: jax.Array
    eigenvalues: jax.Array
    rank: jax.Array


def init_moments(width: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Moments:
    """Returns the moments of no rows, ``[width]`` wide."""
    return Moments(jnp.zeros((), dtype), jnp.zeros(width, dtype), jnp.zeros((width, width), dtype))


def update_moments(moments: Moments, batch: jax.Array, weights: jax.Array | None = None) -> Moments:
    """Adds rows to moments: one matmul, centered on the mean of these rows, so that nothing cancels.

    Rows may be sharded over devices under ``jit``.  Counts are exact in float32 up to 2^24 rows, and correct to 1e-7
    beyond.

    Args:
      moments: Moments in float32 or float64.
      batch: ``[n, d]``, floating point; converted to the dtype of the moments.
      weights: ``[n]``, not negative; 1 by default.  Rows of weight 0 may hold anything.

    Raises:
      ValueError: The width is not that of the moments.
    """
    if batch.ndim != 2 or batch.shape[1] != moments.mean.shape[0]:
        raise ValueError(f"batch: expected rows [n, {moments.mean.shape[0]}], got shape {list(batch.shape)}")
    dtype = moments.mean.dtype
    weights = jnp.ones(batch.shape[0], dtype) if weights is None else weights.astype(dtype)
    there = (weights > 0)[:, None]
    x = jnp.where(there, batch.astype(dtype), 0)
    count = jnp.sum(weights)
    share = (weights / jnp.where(count > 0, count, 1))[None]
    mean = linalg.times(share, x)
    x = jnp.where(there, x - mean, 0)
    # The mean of values far from 0 is rounded; what is left of it is not.
    rest = linalg.times(share, x)
    x = jnp.where(there, x - rest, 0)
    return merge_moments(moments, Moments(count, (mean + rest)[0], linalg.gram(x, weights[:, None] * x)))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of two sets of rows together (Chan, Golub and LeVeque, 1983); either may be empty."""
    return _from_pair(linalg.merge_pair_moments(_as_pair(a), _as_pair(b)))


def psum_moments(moments: Moments, axis_name: str) -> Moments:
    """Merges the moments of the devices along a mesh axis, inside ``shard_map``."""
    return _from_pair(linalg.psum_pair_moments(_as_pair(moments), axis_name))


def subspace_from_moments(
    moments: Moments, *, explained_variance: float = 0.99, rank: int | None = None
) -> PCASubspace:
    """Principal components of moments, with static shapes: for ``jit``.

    The rank is the smallest whose components explain the share of the variance (step 4 of the method of arXiv
    2602.23013); sums of eigenvalues are compensated, since a rounded one may change it.

    Args:
      moments: Moments of at least two rows.
      explained_variance: Share of the variance in (0, 1].
      rank: The rank instead, 0 to ``d``.

    Returns:
      The subspace with all ``d`` components; those from ``rank`` on span its complement.

    Raises:
      ValueError: An option is out of range.
    """
    d = moments.mean.shape[0]
    _check_options(d, explained_variance, rank)
    values, vectors = jnp.linalg.eigh(moments.m2 / (moments.count - 1))
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    vectors = vectors * linalg.canonical_signs(vectors)[None]
    if rank is None:
        # The first r whose rest, summed from the smallest, is at most the share that may be left.
        rests = _compensated_cumsum(values[::-1])
        allowed = (1 - explained_variance) * rests[-1]
        kept = jnp.sum(rests[:-1] > allowed, dtype=jnp.int32) + 1
    else:
        kept = jnp.int32(rank)
    return PCASubspace(moments.mean, vectors, values, kept)


def fit_pca(
    features: jax.Array | np.ndarray,
    *,
    explained_variance: float = 0.99,
    rank: int | None = None,
    weights: jax.Array | np.ndarray | None = None,
) -> PCASubspace:
    """Fits a subspace to rows.

    Args:
      features: ``[n, d]``, floating point, finite.
      explained_variance: Share of the variance that the subspace has, in (0, 1].  At 1 the residual of normal rows is
        rounding noise, and a warning says so.
      rank: The rank instead, 0 to ``d``.
      weights: ``[n]``, not negative; rows of weight 0 may hold anything.

    Returns:
      The subspace with ``components [d, rank]``, float32, or float64 if the features are.

    Raises:
      ValueError: Options are out of range, fewer than two rows have a weight, a feature is not finite, or all rows are
        equal, so that there is no variance to explain.
    """
    features = jnp.asarray(features)
    if features.ndim != 2 or not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(
            f"features: expected floating-point rows [n, d], got {features.dtype} of shape {list(features.shape)}"
        )
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != features.shape[:1] or not bool(jnp.all(weights >= 0)):
            raise ValueError(f"weights: expected {features.shape[0]} numbers of at least 0, got {weights.shape}")
    there = features.shape[0] if weights is None else int(jnp.sum(weights > 0))
    if there < 2:
        raise ValueError(f"features: expected at least 2 rows, got {there}")
    dtype = linalg.working_dtype(features)
    # In float64 whatever the features: small variances of float32 sums would have few digits.
    with jax.enable_x64(True):
        moments = _moments_in_float64(features, weights)
    return solved_subspace(moments, explained_variance=explained_variance, rank=rank, dtype=dtype)


def solved_subspace(
    moments: Moments,
    *,
    explained_variance: float = 0.99,
    rank: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> PCASubspace:
    """Fits a subspace to moments on the host, in float64: an eigendecomposition would compile for long on accelerators.

    Args:
      moments: Moments of at least two rows.
      explained_variance: See :func:`fit_pca`.
      rank: Likewise.
      dtype: Of the result.

    Returns:
      The subspace with ``components [d, rank]``.

    Raises:
      ValueError: As :func:`fit_pca`.
    """
    d = moments.mean.shape[0]
    _check_options(d, explained_variance, rank)
    count, mean, m2 = (np.asarray(x, np.float64) for x in moments)
    if not (np.isfinite(count) and np.all(np.isfinite(mean)) and np.all(np.isfinite(m2))):
        raise ValueError("features: expected finite numbers, got NaN or infinity")
    if count < 2:
        raise ValueError(f"features: expected at least 2 rows, got {count:g}")
    values, vectors = np.linalg.eigh((m2 + m2.T) / (2 * (count - 1)))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    # What equal rows far from 0 have, of rounding.
    rounding = d * np.square(np.finfo(moments.mean.dtype).eps * np.max(np.abs(mean)))
    if rank is None:
        if not np.sum(values) > 4 * rounding:
            raise ValueError(f"features: expected rows that differ, got {count:g} equal ones")
        if explained_variance == 1:
            _log.warning("explained_variance: at 1 the residual of normal examples is rounding noise; 0.99 is usual")
        rank = min(int(np.searchsorted(np.cumsum(values) / np.sum(values), explained_variance)) + 1, d)
    kept = vectors[:, :rank]
    if rank:  # signs as of linalg.canonical_signs
        kept = kept * np.where(kept[np.argmax(np.abs(kept), axis=0), np.arange(rank)] < 0, -1, 1)
    return PCASubspace(*(jnp.asarray(x, dtype) for x in (mean, kept, values)), np.int32(rank))


def residual_score(
    subspace: PCASubspace, x: jax.Array, *, method: str = "reconstruction", drop_leading: int = 0
) -> jax.Array:
    """Anomaly scores of rows (step 5 of the method of arXiv 2602.23013).

    With ``y = x - mean`` and ``z = C^T y``: "reconstruction" is ``||y - C z||^2``, "mahalanobis" the sum of ``z_i^2 /
    (eigenvalue_i + 1e-6)``, "euclidean" that of ``z_i^2``, and "cosine" one minus the cosine of ``x`` and ``mean + C
    z``.  The residual is never a difference of energies.  Traceable, with sharded rows.

    Args:
      subspace: The subspace, of either form.
      x: ``[n, d]``, float32, bfloat16 or float64.
      method: One of the four.
      drop_leading: Leading directions that count as outside the subspace: 0 for none.

    Returns:
      ``[n]``, float32 or float64.

    Raises:
      ValueError: The method is unknown, ``drop_leading`` is negative, or the width is not that of the subspace.
    """
    d, columns = subspace.components.shape
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if drop_leading < 0:
        raise ValueError(f"drop_leading: expected at least 0, got {drop_leading}")
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"x: expected rows [n, {d}], the width of the subspace, got shape {list(x.shape)}")
    dtype = linalg.working_dtype(x, subspace.mean)
    index = jnp.arange(columns, dtype=jnp.int32)
    inside = ((index >= drop_leading) & (index < subspace.rank)).astype(dtype)
    basis = subspace.components.astype(dtype) * inside[None]
    mean = subspace.mean.astype(dtype)
    if method == "reconstruction" and columns:
        return kernels.subspace_residual(x, mean, basis)
    x = x.astype(dtype)
    y = x - mean[None]
    if method == "reconstruction":
        return jnp.sum(jnp.square(y), axis=1)
    z = linalg.times(y, basis)
    if method == "cosine":
        return 1 - jnp.clip(jnp.sum(_unit(x) * _unit(mean[None] + linalg.times(z, basis.T)), axis=1), -1, 1)
    variances = (
        subspace.eigenvalues[:columns].astype(dtype) + _EPS if method == "mahalanobis" else jnp.ones_like(inside)
    )
    return jnp.sum(jnp.square(z) / variances[None], axis=1)


def tail_mean(scores: jax.Array, fraction: float = 0.01) -> jax.Array:
    """Mean of the largest scores, ``max(1, floor(fraction n))`` of them (step 7: tail value at risk).

    Args:
      scores: ``[..., n]``.
      fraction: Share of the scores, in (0, 1].

    Returns:
      ``[...]``.

    Raises:
      ValueError: The fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a share in (0, 1], got {fraction}")
    count = max(1, int(fraction * scores.shape[-1]))
    return jnp.mean(jnp.sort(scores, axis=-1)[..., -count:], axis=-1)


@jax.jit
def _moments_in_float64(features: jax.Array, weights: jax.Array | None) -> Moments:
    return update_moments(init_moments(features.shape[1], jnp.float64), features, weights)


def padded_columns(columns: np.ndarray) -> jax.Array:
    """Pads a basis ``[d, p]`` with zero columns, which change no score, to a multiple of 32 and at least one.

    Bases of like ranks so share one compilation.
    """
    d, p = columns.shape
    wanted = min(d, max(1, -(-p // _COLUMNS)) * _COLUMNS)
    return jnp.asarray(np.pad(np.asarray(columns), ((0, 0), (0, wanted - p))))


def _check_options(d: int, explained_variance: float, rank: int | None) -> None:
    if not 0 < explained_variance <= 1:
        raise ValueError(f"explained_variance: expected a share in (0, 1], got {explained_variance}")
    if rank is not None and not 0 <= rank <= d:
        raise ValueError(f"rank: expected 0 to {d}, the width of the features, got {rank}")


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x, axis=1, keepdims=True) + _EPS)


def _compensated_cumsum(x: jax.Array) -> jax.Array:
    """Cumulative sums in the order given, with the rounding of each addition carried along (Neumaier)."""

    def add(carry, value):
        total, lost = carry
        new = total + value
        lost = lost + jnp.where(jnp.abs(total) >= jnp.abs(value), (total - new) + value, (value - new) + total)
        return (new, lost), new + lost

    zero = jnp.zeros((), x.dtype)
    return jax.lax.scan(add, (zero, zero), x)[1]


def _as_pair(m: Moments) -> linalg.PairMoments:
    """Moments of pairs whose second vectors have no entries."""
    return linalg.PairMoments(m.count, m.mean, m.mean[:0], m.m2, m.m2[:, :0], m.m2[:0, :0])


def _from_pair(m: linalg.PairMoments) -> Moments:
    return Moments(m.count, m.mean_x, m.xx)
