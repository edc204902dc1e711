"""Distance of two sets of points."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import nearest_rows, working_dtype


def chamfer_distance(p: jax.Array, q: jax.Array) -> jax.Array:
    """Chamfer distance ``mean_p min_q ||p - q||^2 + mean_q min_p ||p - q||^2`` of two point clouds.

    The search is in blocks, see :func:`subspace_jax.linalg.nearest_rows`; under ``vmap`` it takes many pairs of clouds.
    Derivatives are those of the distances to the points that were found.

    Args:
      p: ``[points, d]``, floating point.
      q: ``[others, d]``.

    Returns:
      A scalar in the unit of the squared coordinates, float32 or wider.

    Raises:
      ValueError: Shapes do not match, or a cloud is empty.
    """
    if p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[1] or 0 in (*p.shape, *q.shape):
        raise ValueError(
            f"p, q: expected points of one dimension [points, d] and [others, d], got {p.shape}, {q.shape}"
        )
    dtype = working_dtype(p, q)
    p, q = p.astype(dtype), q.astype(dtype)
    return _to_nearest(p, q) + _to_nearest(q, p)


def _to_nearest(points, others):
    fixed = jax.lax.stop_gradient((points, others))
    index = nearest_rows(*fixed, 1)[1][:, 0]
    # From the coordinates: the distances of the search are rounded by the lengths of the points.
    return jnp.mean(jnp.sum(jnp.square(points - others[index]), axis=1))
