"""Nearest-neighbour classification on fixed features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from subspace_jax import linalg, train
from subspace_jax.represent.linear_probe import check_examples, shard_examples

_QUERIES_AT_A_TIME = 128


def nearest_classes(
    features: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    num_classes: int | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Classifies queries by a vote of the ``k`` nearest examples in cosine similarity.

    The vote of a neighbour with cosine ``s`` has weight ``exp(s / temperature)`` (Wu et al., arXiv 1805.01978, section
    3.4), or 1 where ``temperature`` is None.  Each device holds 128 x examples cosines at a time.

    Args:
      features: ``[examples, n]``.
      labels: ``[examples]`` integers from 0.
      queries: ``[queries, n]``.
      k: Number of neighbours.
      temperature: Temperature of the votes; None for equal votes.
      num_classes: Number of classes; the largest label plus 1 by default.
      mesh: Mesh over which the queries are sharded; all devices by default.

    Returns:
      The class of each query, ``[queries]`` int32.

    Raises:
      ValueError: A shape, a label or an option is invalid.
    """
    features, labels, _ = check_examples(features, labels, num_classes)
    queries = np.asarray(queries, np.float32)
    if not np.isfinite(queries).all():
        raise ValueError("queries: expected finite values, got NaN or infinity")
    if queries.ndim != 2 or queries.shape[1] != features.shape[1]:
        raise ValueError(f"queries: expected [queries, {features.shape[1]}], got shape {list(queries.shape)}")
    if not 1 <= k <= len(labels):
        raise ValueError(f"k: expected 1 to {len(labels)} neighbours, got {k}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, or None, got {temperature}")
    mesh = train.make_mesh() if mesh is None else mesh
    (placed,) = shard_examples(mesh, queries)
    # Votes are counted for the classes that occur only, as labels may be large.
    classes, group = np.unique(labels, return_inverse=True)
    options = {"k": k, "temperature": temperature, "num_classes": len(classes), "ways": mesh.size}
    found = _vote(features, group.astype(np.int32), placed, **options)
    return classes[np.asarray(found)[: len(queries)]]


@functools.partial(jax.jit, static_argnames=("k", "temperature", "num_classes", "ways"))
def _vote(features, labels, queries, *, k, temperature, num_classes, ways):
    features, queries = linalg.unit_vectors(features), linalg.unit_vectors(queries)

    def one(query):
        cosines, nearest = jax.lax.top_k(jnp.matmul(features, query, precision=jax.lax.Precision.HIGHEST), k)
        votes = jnp.ones(k) if temperature is None else jnp.exp((cosines - cosines[0]) / temperature)
        return jnp.argmax(jax.ops.segment_sum(votes, labels[nearest], num_classes)).astype(jnp.int32)

    # Each device loops over its own queries: a loop over all of them would leave all devices but one idle.
    shards = queries.reshape(ways, -1, queries.shape[-1])
    return jax.vmap(lambda own: jax.lax.map(one, own, batch_size=_QUERIES_AT_A_TIME))(shards).reshape(-1)
