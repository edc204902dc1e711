"""From an embedding to labels."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg

ROUNDINGS = ("snem-cpqr", "snem", "kmeans")
_RANDOM_STARTS = 8
_KMEANS_STARTS = 10
_ROUNDING_ERRORS = 64


def snem_round(Y: jax.Array, n_iter: int = 100, init: jax.Array | None = None) -> jax.Array:
    """Labels whose normalized indicators the embedding projects onto, by fixed-point steps.

    With ``C`` the indicators of the clusters, each divided by the root of its size, a step takes ``argmax_j
    (Y Y^T C)_ij``.  The result depends on signs and rotations of ``Y``, unless ``init`` is given.

    Args:
      Y: ``[n, k]``, floating point.
      n_iter: Steps, at most; labels that a step does not change are final.
      init: Labels ``[n]`` to start from; the largest entry of each row by default.

    Returns:
      ``[n]`` int32.

    Raises:
      ValueError: ``Y`` is no matrix, ``n_iter`` is negative, or ``init`` has another length.
    """
    if Y.ndim != 2:
        raise ValueError(f"Y: expected an embedding [n, k], got shape {Y.shape}")
    if n_iter < 0:
        raise ValueError(f"n_iter: expected 0 or more, got {n_iter}")
    if init is not None and init.shape != Y.shape[:1]:
        raise ValueError(f"init: expected labels [{Y.shape[0]}], got shape {init.shape}")
    labels = _argmax(Y) if init is None else jnp.asarray(init).astype(jnp.int32)

    def going(carry):
        _, changed, steps = carry
        return changed & (steps < n_iter)

    def step(carry):
        labels, _, steps = carry
        now = _argmax(linalg.times(Y, _projected(Y, labels)))
        return now, jnp.any(now != labels), steps + 1

    return jax.lax.while_loop(going, step, (labels, jnp.bool_(True), jnp.int32(0)))[0]


def round_embedding(key: jax.Array, Y: jax.Array, rounding: str = "snem-cpqr") -> jax.Array:
    """Labels of an embedding.

    ``snem``: :func:`snem_round`.  ``snem-cpqr``: the same from nine starts, of which the one with the largest ``tr(C^T
    Y Y^T C)`` counts: the rotation that takes the pivot rows of ``Y`` (QR with column pivoting) nearest to unit
    vectors, and eight sets of rows that are nearly orthogonal to each other, the first of each at random.
    ``kmeans``: k-means of the rows divided by their lengths, ten starts.

    Args:
      key: Key of the starts.
      Y: ``[n, k]``, float32 or float64, ``k <= n``.
      rounding: One of the three.

    Returns:
      ``[n]`` int32.

    Raises:
      ValueError: ``rounding`` is unknown, or ``Y`` is wider than tall.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "snem":
        return snem_round(Y)
    if Y.ndim != 2 or Y.shape[1] > Y.shape[0]:
        raise ValueError(f"Y: expected an embedding [n, k] with k <= n, got shape {Y.shape}")
    unit = linalg.unit_vectors(Y)
    if rounding == "kmeans":
        return linalg.kmeans(key, unit, Y.shape[1], restarts=_KMEANS_STARTS).assignments
    keys = jax.random.split(key, _RANDOM_STARTS)
    starts = jnp.stack([_pivot_start(Y), *(_orthogonal_start(key, unit) for key in keys)])
    labels = jax.lax.map(lambda init: snem_round(Y, init=init), starts)
    scores = jax.lax.map(lambda one: jnp.sum(jnp.square(_projected(Y, one))), labels)
    # The first of those that rounding errors alone tell from the best, so that their order decides nothing.
    return labels[jnp.argmax(scores >= (1 - _ROUNDING_ERRORS * jnp.finfo(scores.dtype).eps) * jnp.max(scores))]


def _argmax(x: jax.Array) -> jax.Array:
    return jnp.argmax(x, axis=1).astype(jnp.int32)


def _projected(Y: jax.Array, labels: jax.Array) -> jax.Array:
    """``Y^T C [k, k]`` with the normalized indicators ``C`` of labels; 0 of an empty cluster."""
    members = jax.nn.one_hot(labels, Y.shape[1], dtype=Y.dtype)
    return linalg.gram(Y, members) / jnp.sqrt(jnp.maximum(jnp.sum(members, axis=0), 1))[None]


def _pivot_start(Y: jax.Array) -> jax.Array:
    rows = Y[linalg.pivot_rows(Y, Y.shape[1])]
    u, _, vt = linalg.canonical_svd(rows.T)
    return _argmax(jnp.abs(linalg.times(Y, linalg.times(u, vt))))


def _orthogonal_start(key: jax.Array, unit: jax.Array) -> jax.Array:
    # A row of zeros is orthogonal to all others and stands for no cluster.
    nothing = jnp.where(jnp.any(unit != 0, axis=1), 0, jnp.inf).astype(unit.dtype)
    first = unit[jnp.argmax(jax.random.uniform(key, nothing.shape, unit.dtype) - nothing)]

    def step(carry, _):
        sums, row = carry
        sums = sums + jnp.abs(linalg.times(unit, row[:, None])[:, 0])
        return (sums, unit[jnp.argmin(sums)]), row

    _, rows = jax.lax.scan(step, (nothing, first), None, length=unit.shape[1])
    return _argmax(linalg.times(unit, rows.T))
