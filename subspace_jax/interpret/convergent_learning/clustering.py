"""Groups of units of two networks that go together: many to many (arXiv 1511.07543, section 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import eigengap


class SpectralEmbedding(NamedTuple):
    """Eigenvectors of the Laplacian of a bipartite graph.

    Attributes:
      embedding: ``[p + q, k]``, units of the first network first; orthonormal columns.
      eigenvalues: ``[k]``, ascending, in ``[0, 2]``.
    """

    embedding: jax.Array
    eigenvalues: jax.Array


class UnitClusters(NamedTuple):
    """Clusters of the units of two networks; one with units of both is shared.

    Attributes:
      labels_x: Cluster of each unit of the first network, ``[p]`` from 0.
      labels_y: ``[q]``, likewise.
      eigenvalues: Smallest eigenvalues of the Laplacian.
    """

    labels_x: np.ndarray
    labels_y: np.ndarray
    eigenvalues: np.ndarray


def bipartite_spectral(a: jax.Array, k: int) -> SpectralEmbedding:
    """Embeds the units of two networks by the normalized Laplacian of the graph between them.

    Its eigenvalues are 1 minus and plus the singular values of ``D_x^-1/2 a D_y^-1/2``, its eigenvectors their singular
    vectors (Dhillon, KDD 2001): the SVD of ``[p, q]`` in place of an eigenproblem of ``[p + q, p + q]``.

    Args:
      a: Affinities ``[p, q]``, not negative, such as magnitudes of correlations; float32 or float64.
      k: Number of eigenvectors, of the smallest eigenvalues; static.

    Returns:
      The embedding.  A unit without affinity to any is at 0.

    Raises:
      ValueError: ``a`` is no matrix, or ``k`` is not between 1 and ``p + q``.
    """
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"a: expected affinities [p, q], got shape {a.shape}")
    p, q = a.shape
    if not 1 <= k <= p + q:
        raise ValueError(f"k: expected 1 to {p + q}, the number of units, got {k}")
    of_x, of_y = (jnp.sum(a, axis=i) for i in (1, 0))
    scale_x, scale_y = (jnp.where(d > 0, 1 / jnp.sqrt(jnp.where(d > 0, d, 1)), 0) for d in (of_x, of_y))
    least = min(p, q)
    u, s, vt = jnp.linalg.svd(scale_x[:, None] * a * scale_y[None], full_matrices=k > least)
    low = jnp.concatenate([u[:, :least], vt[:least].T]) / np.sqrt(2)
    if k <= least:
        return SpectralEmbedding(low[:, :k], 1 - s[:k])
    # Beyond them: vectors of the larger side alone, of eigenvalue 1, and the mirror images.
    high = jnp.concatenate([u[:, :least], -vt[:least].T])[:, ::-1] / np.sqrt(2)
    alone = jnp.concatenate([jnp.pad(u[:, least:], ((0, q), (0, 0))), jnp.pad(vt[least:].T, ((p, 0), (0, 0)))], axis=1)
    values = jnp.concatenate([1 - s, jnp.ones(abs(p - q), s.dtype), 1 + s[::-1]])
    return SpectralEmbedding(jnp.concatenate([low, alone, high], axis=1)[:, :k], values[:k])


def ward_cluster(embedding: np.ndarray, k: int) -> np.ndarray:
    """Agglomerative clustering with Ward's linkage, on the host.

    Args:
      embedding: ``[units, dims]``.
      k: Number of clusters.

    Returns:
      ``[units]`` int32, clusters in the order of their first unit.

    Raises:
      ValueError: ``k`` is not between 1 and the number of units, or the embedding is not finite.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    embedding = np.asarray(embedding, np.float64)
    if embedding.ndim != 2 or not 1 <= k <= len(embedding):
        raise ValueError(f"k: expected 1 to the number of units, got {k} for an embedding {embedding.shape}")
    if not np.isfinite(embedding).all():
        raise ValueError("embedding: expected finite numbers, got NaN or infinity")
    if len(embedding) == 1:
        return np.zeros(1, np.int32)
    labels = fcluster(linkage(embedding, "ward"), k, "maxclust")
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first)).astype(np.int32)[labels]


def cluster_units(c: jax.Array, k: int | None = None) -> UnitClusters:
    """Clusters the units of two networks by the magnitudes of their correlations.

    Args:
      c: Correlations ``[p, q]`` between the networks.
      k: Number of clusters; by the eigengap by default.

    Returns:
      The clusters.

    Raises:
      ValueError: ``k`` is not between 1 and ``p + q``.
    """
    a = jnp.abs(jnp.asarray(c))
    found = bipartite_spectral(a, min(a.shape) if k is None else k)
    if k is None:
        k = eigengap(found.eigenvalues) if min(a.shape) > 1 else 1
    labels = ward_cluster(found.embedding[:, :k], k)
    return UnitClusters(labels[: a.shape[0]], labels[a.shape[0] :], np.asarray(found.eigenvalues))
