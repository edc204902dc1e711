"""Which pairs serve as anchors."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import kmeans, unit_vectors, working_dtype

SELECTIONS = ("random", "kmeans")


def select_anchors(key: jax.Array, z: jax.Array, n: int, method: str = "random") -> jax.Array:
    """Chooses items as anchors.

    Args:
      key: Key of the draw, or of the starts of k-means.
      z: Features of the items in one of the spaces, ``[items, p]``, floating point.
      n: Number of anchors, static.
      method: "random", or "kmeans" for the item nearest by cosine to each of ``n`` centres, among those of its cluster
        (arXiv 2401.05224); it takes items nearest to any centre where a cluster is empty.

    Returns:
      Indices of different items, ``[n]`` int32.

    Raises:
      ValueError: ``n`` is not between 1 and the number of items, or the method is unknown.
    """
    if method not in SELECTIONS:
        raise ValueError(f"method: expected one of {', '.join(SELECTIONS)}, got {method!r}")
    if z.ndim != 2 or not 1 <= n <= z.shape[0]:
        raise ValueError(f"n: expected 1 to {z.shape[0]} of items [items, p], got {n} of {z.shape}")
    if method == "random":
        return jax.random.permutation(key, z.shape[0])[:n].astype(jnp.int32)
    z = z.astype(working_dtype(z))
    found = kmeans(key, z, n)
    cosines = jnp.sum(unit_vectors(z) * unit_vectors(found.centers)[found.assignments], axis=1)
    best = jax.ops.segment_max(cosines, found.assignments, n)[found.assignments]
    index = jnp.arange(z.shape[0])
    # The first of equal ones; what is nearest in its cluster comes before all others.
    first = jax.ops.segment_min(jnp.where(cosines == best, index, z.shape[0]), found.assignments, n)[found.assignments]
    return jax.lax.top_k(cosines + jnp.where(index == first, 4, 0), n)[1].astype(jnp.int32)


def stretched(za: jax.Array, zq: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides features by their deviation over anchors and queries together, an option of arXiv 2401.05224.

    It looks at the queries, as other steps must not: it is for a fixed set of items, not for new ones.

    Args:
      za: Anchors, ``[anchors, p]``, floating point.
      zq: Queries in the same space, ``[items, p]``.

    Returns:
      Both, with deviation 1 together; a constant feature is unchanged.

    Raises:
      ValueError: The widths differ.
    """
    if za.ndim != 2 or zq.ndim != 2 or za.shape[1] != zq.shape[1]:
        raise ValueError(f"za, zq: expected features of one width, got {za.shape} and {zq.shape}")
    deviation = jnp.std(jnp.concatenate([za, zq]), axis=0, ddof=1, keepdims=True)
    deviation = jnp.where(deviation > 0, deviation, 1)
    return za / deviation, zq / deviation
