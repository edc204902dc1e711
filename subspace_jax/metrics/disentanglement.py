"""How much each dimension of a code says about each factor: mutual information, MIG, modularity, SAP.

Definitions as in disentanglement_lib (Locatello et al., arXiv 1811.12359).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import gram, working_dtype

_LEAST_VARIANCE = 1e-12


def histogram_discretize(codes: jax.Array, num_bins: int = 20) -> jax.Array:
    """Sorts each dimension of a code into bins of equal width between its minimum and its maximum.

    Args:
      codes: ``[examples, dims]``, floating point.
      num_bins: Number of bins.

    Returns:
      Bins from 1 to ``num_bins``, ``[examples, dims]`` int32; a constant dimension is in one bin.

    Raises:
      ValueError: ``codes`` is no matrix, holds NaN or infinity, or ``num_bins`` is below 1.
    """
    check_codes("codes", codes)
    if num_bins < 1:
        raise ValueError(f"num_bins: expected at least 1, got {num_bins}")
    return _discretized(codes, num_bins)


@functools.partial(jax.jit, static_argnums=1)
def _discretized(codes, num_bins):
    codes = codes.astype(working_dtype(codes))
    low, high = jnp.min(codes, axis=0), jnp.max(codes, axis=0)
    steps = jnp.arange(num_bins, dtype=codes.dtype)
    edges = steps[:, None] * ((high - low) / num_bins)[None] + low[None]
    bins = jax.vmap(functools.partial(jnp.searchsorted, side="right"), in_axes=1, out_axes=1)(edges, codes)
    return bins.astype(jnp.int32)


def mutual_information_matrix(bins: jax.Array, factors: jax.Array) -> jax.Array:
    """Mutual information between each discrete code and each factor, from their joint counts.

    Codes and factors may hold any integers.  Costs a sort of the examples for each pair; under ``jit`` as well.

    Args:
      bins: ``[examples, dims]`` integers, such as those of :func:`histogram_discretize`.
      factors: ``[examples, factors]`` integers.

    Returns:
      ``[dims, factors]`` in nats, float32, or float64 where 64-bit types are enabled; never negative.

    Raises:
      ValueError: Shapes do not match, or something else than integers came.
    """
    if bins.ndim != 2 or not jnp.issubdtype(bins.dtype, jnp.integer):
        raise ValueError(f"bins: expected integers [examples, dims], got {bins.dtype} {bins.shape}")
    check_factors("factors", factors, bins.shape[0])
    return _information(bins, factors)


@jax.jit
def _information(bins, factors):
    bins, factors = bins.astype(jnp.int32), factors.astype(jnp.int32)

    def of_code(code):
        return jax.lax.map(lambda factor: _entropy(code, factor), factors.T)

    joint = jax.lax.map(of_code, bins.T)
    return jnp.maximum(factor_entropy(bins)[:, None] + factor_entropy(factors)[None, :] - joint, 0)


@jax.jit
def factor_entropy(factors: jax.Array) -> jax.Array:
    """Entropy of each column of a matrix of integers, from its counts.

    Args:
      factors: ``[examples, factors]`` integers.

    Returns:
      ``[factors]`` in nats, float32, or float64 where 64-bit types are enabled.
    """
    return jax.lax.map(_entropy, factors.T.astype(jnp.int32))


def mig(codes: jax.Array, factors: jax.Array, num_bins: int = 20) -> jax.Array:
    """Mutual information gap (Chen et al., arXiv 1802.04942).

    The mean over factors of the difference between the two largest entries of their column in
    :func:`mutual_information_matrix`, divided by their entropy.

    Args:
      codes: ``[examples, dims]``, at least two dimensions.
      factors: ``[examples, factors]`` integers, each factor with several values.
      num_bins: Bins of each dimension.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: Shapes do not match, codes are not finite, there is one dimension, or a factor has one value.
    """
    _check_both(codes, factors)
    if codes.shape[1] < 2:
        raise ValueError(f"codes: expected at least two dimensions for a gap, got {codes.shape}")
    return _mig(codes, factors, num_bins)


@functools.partial(jax.jit, static_argnums=2)
def _mig(codes, factors, num_bins):
    return jnp.mean(_gap(_information(_discretized(codes, num_bins), factors)) / factor_entropy(factors))


def modularity(codes: jax.Array, factors: jax.Array, num_bins: int = 20) -> jax.Array:
    """How nearly each dimension of a code informs about one factor only (Ridgeway and Mozer, arXiv 1802.05312).

    Of a row of :func:`mutual_information_matrix` with the largest square m: ``1 - (sum of squares - m) / (m (K - 1))``
    for K factors, 0 where m is 0; the mean over dimensions.

    Args:
      codes: ``[examples, dims]``.
      factors: ``[examples, factors]`` integers, at least two factors.
      num_bins: Bins of each dimension.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: Shapes do not match, codes are not finite, there is one factor, or a factor has one value.
    """
    _check_both(codes, factors)
    check_several_factors(factors.shape[1])
    return _modularity(codes, factors, num_bins)


@functools.partial(jax.jit, static_argnums=2)
def _modularity(codes, factors, num_bins):
    squares = jnp.square(_information(_discretized(codes, num_bins), factors))
    largest, total = jnp.max(squares, axis=1), jnp.sum(squares, axis=1)
    informs = largest > 0
    others = (total - largest) / (jnp.where(informs, largest, 1) * (factors.shape[1] - 1))
    return jnp.mean(jnp.where(informs, 1 - others, 0))


def sap_from_scores(scores: jax.Array) -> jax.Array:
    """Separated attribute predictability (Kumar et al., arXiv 1711.00848) from the score of each dimension.

    Args:
      scores: ``[dims, factors]``: how well a factor is predicted from a dimension alone.  For discrete factors, the
        test accuracy of a linear classifier.

    Returns:
      The mean over factors of the difference between the two best dimensions, a scalar.

    Raises:
      ValueError: There are fewer than two dimensions, or a score is NaN.
    """
    check_codes("scores", scores)
    if scores.shape[0] < 2:
        raise ValueError(f"scores: expected at least two dimensions for a gap, got {scores.shape}")
    return jnp.mean(_gap(scores))


def sap_continuous(codes: jax.Array, factors: jax.Array) -> jax.Array:
    """:func:`sap_from_scores` of the squared correlations of dimensions and factors.

    Args:
      codes: ``[examples, dims]``, at least two dimensions.  One with a variance of at most 1e-12 has score 0.
      factors: ``[examples, factors]`` numbers in whose order there is sense; see :func:`mig`.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: As for :func:`mig`.
    """
    _check_both(codes, factors)
    if codes.shape[1] < 2:
        raise ValueError(f"codes: expected at least two dimensions for a gap, got {codes.shape}")
    return _sap(codes, factors)


@jax.jit
def _sap(codes, factors):
    wide = working_dtype(codes)
    codes, values = (x.astype(wide) - jnp.mean(x.astype(wide), axis=0, keepdims=True) for x in (codes, factors))
    count = codes.shape[0]
    variance, of_factor = (jnp.sum(jnp.square(x), axis=0) / count for x in (codes, values))
    there = variance > _LEAST_VARIANCE
    product = jnp.where(there, variance, 1)[:, None] * of_factor[None, :]
    return jnp.mean(_gap(jnp.where(there[:, None], jnp.square(gram(codes, values) / count) / product, 0)))


def check_codes(name: str, codes: jax.Array) -> None:
    """Raises a ValueError unless codes are a matrix ``[examples, dims]`` and, outside of ``jit``, finite."""
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"{name}: expected a matrix [examples, dims], got shape {codes.shape}")
    if _is_here(codes) and not np.isfinite(np.asarray(codes)).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def check_factors(name: str, factors: jax.Array, num_examples: int) -> None:
    """Raises a ValueError unless factors are integers ``[examples, factors]``."""
    if factors.ndim != 2 or factors.shape[0] != num_examples or not factors.shape[1]:
        raise ValueError(f"{name}: expected [{num_examples}, factors], got shape {factors.shape}")
    if not jnp.issubdtype(factors.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, got {factors.dtype}")


def check_several_factors(num_factors: int) -> None:
    """Raises a ValueError for a single factor, of which no dimension can be told from another's."""
    if num_factors < 2:
        raise ValueError(f"factors: expected at least two, got {num_factors}")


def _check_both(codes: jax.Array, factors: jax.Array) -> None:
    check_codes("codes", codes)
    check_factors("factors", factors, codes.shape[0])
    if _is_here(factors) and (constant := np.flatnonzero(np.ptp(np.asarray(factors), axis=0) == 0)).size:
        raise ValueError(f"factors: expected several values of each, factor {constant[0]} has one")


def _is_here(x: jax.Array) -> bool:
    """Whether the values of an array can be looked at."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _gap(scores: jax.Array) -> jax.Array:
    """Returns the largest minus the second largest entry of each column."""
    best, _ = jax.lax.top_k(scores.T, 2)
    return best[:, 0] - best[:, 1]


def _entropy(*labels: jax.Array) -> jax.Array:
    """Entropy of what one or several arrays ``[examples]`` of integers say together, in nats."""
    count = labels[0].shape[0]
    labels = jax.lax.sort(labels, num_keys=len(labels))
    new = functools.reduce(jnp.logical_or, (x[1:] != x[:-1] for x in labels))
    group = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new.astype(jnp.int32))])
    sizes = jax.ops.segment_sum(jnp.ones(count), group, count)
    share = sizes / count
    return -jnp.sum(jnp.where(sizes > 0, share * jnp.log(jnp.where(sizes > 0, share, 1)), 0))
