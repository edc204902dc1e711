"""Nearest neighbours on fixed features, as an evaluation without training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from subspace_jax import linalg, train
from subspace_jax.represent.linear_probe import check_examples, rows_on

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
    """Classifies by the labels of the ``k`` nearest examples, near by cosine.

    A neighbour of cosine ``s`` votes with weight ``exp(s / temperature)`` (Wu et al., arXiv 1805.01978, section 3.4),
    or all alike where ``temperature`` is None.  Takes memory for 128 x examples cosines on each device.

    Args:
      features: ``[examples, n]``.
      labels: ``[examples]`` integers from 0.
      queries: ``[queries, n]``.
      k: Number of neighbours.
      temperature: Of the votes.
      num_classes: Number of classes; the largest label plus 1 by default.
      mesh: Queries are split over it; all devices by default.

    Returns:
      The class of each query, ``[queries]`` int32.

    Raises:
      ValueError: Shapes, labels or numbers can't serve.
    """
    features, labels, _ = check_examples(features, labels, num_classes)
    queries = np.asarray(queries, np.float32)
    if not np.isfinite(queries).all():
        raise ValueError("queries: expected finite numbers, got some that are not")
    if queries.ndim != 2 or queries.shape[1] != features.shape[1]:
        raise ValueError(f"queries: expected [queries, {features.shape[1]}], got shape {list(queries.shape)}")
    if not 1 <= k <= len(labels):
        raise ValueError(f"k: expected 1 to {len(labels)} neighbours, got {k}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, or None, got {temperature}")
    mesh = train.make_mesh() if mesh is None else mesh
    (placed,) = rows_on(mesh, queries)
    # Votes are counted for the classes that occur, however large their labels are.
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

    # Each device goes through its own rows; a loop over all of them would keep all but one waiting.
    shares = queries.reshape(ways, -1, queries.shape[-1])
    return jax.vmap(lambda own: jax.lax.map(one, own, batch_size=_QUERIES_AT_A_TIME))(shares).reshape(-1)
