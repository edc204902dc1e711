"""Normalized spectral clustering of a graph, dense, sparse or known by its products alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg._checks import check_finite, check_integer, is_here
from subspace_jax.linalg.eigenpairs import top_eigenpairs
from subspace_jax.linalg.kmeans import kmeans
from subspace_jax.linalg.products import times, working_dtype
from subspace_jax.linalg.scaling import unit_vectors
from subspace_jax.linalg.sparse_rows import SparseRows, sparse_times, sparse_transpose_times
from subspace_jax.linalg.svd import canonical_signs

_DENSE = 4000
_ASYMMETRY = 1e-6

Affinity = jax.Array | SparseRows | Callable[[jax.Array], jax.Array]


class SpectralEmbedding(NamedTuple):
    """Leading eigenvectors of a normalized affinity ``D^-1/2 W D^-1/2``.

    Attributes:
      vectors: ``[n, k]``, orthonormal columns of canonical signs.
      eigenvalues: ``[k]``, descending, at most 1: one minus those of the normalized Laplacian.
      residual: ``[]``, the largest norm of what the eigenpairs leave of their equation; 0 of a dense solution.
    """

    vectors: jax.Array
    eigenvalues: jax.Array
    residual: jax.Array


class SpectralClustering(NamedTuple):
    """Clusters of the nodes of a graph.

    Attributes:
      assignments: ``[n]`` int32.
      embedding: The eigenvectors that were clustered.
    """

    assignments: jax.Array
    embedding: SpectralEmbedding


def affinity_product(w: Affinity) -> Callable[[jax.Array], jax.Array]:
    """Returns the function ``v -> W v`` of an affinity, for ``v [n, p]``.

    Args:
      w: ``[n, n]``; or :class:`SparseRows` ``Z``, which stand for ``Z + Z^T``; or the function itself.
    """
    if isinstance(w, SparseRows):
        return lambda v: sparse_times(w, v) + sparse_transpose_times(w, v)
    return w if callable(w) else lambda v: times(w, v)


def spectral_embedding(
    w: Affinity, k: int, *, key: jax.Array | None = None, n: int | None = None, solver: str | None = None
) -> SpectralEmbedding:
    """Leading eigenvectors of ``D^-1/2 W D^-1/2`` with ``D`` the diagonal of row sums (Ng, Jordan and Weiss, 2002).

    Those of the smallest eigenvalues of the normalized Laplacian.  A node without affinity to any is at 0, or anywhere
    in the embedding of isolated nodes where the graph has many parts.

    Args:
      w: Affinities: ``[n, n]``, symmetric and not negative; or :class:`SparseRows` ``Z``, which stand for ``Z + Z^T``;
        or a function that returns ``W v`` for ``v [n, p]``, float32.
      k: Number of eigenvectors, static.
      key: Key of the iterative solver's start; that of seed 0 by default.
      n: Number of nodes, where ``w`` is a function.
      solver: ``"eigh"`` of the dense matrix, or ``"subspace"``: :func:`top_eigenpairs`, which needs no ``[n, n]``.  By
        default the former for an array of up to 4000 nodes.

    Returns:
      The embedding; float32 or wider.

    Raises:
      ValueError: ``w`` is not square, or (where its values are known) has a negative entry or a NaN, or differs from
        its transpose by more than 1e-6 of its largest entry; or ``k`` is not between 1 and ``n``, or ``solver`` is
        unknown.
      TypeError: ``k`` is no integer.
    """
    if not isinstance(w, SparseRows) and not callable(w):
        w = jnp.asarray(w)
    count, k = _check_affinity(w, n), check_integer("k", k)
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1 to {count}, the number of nodes, got {k}")
    if solver is None:
        solver = "eigh" if isinstance(w, jax.Array) and count <= _DENSE else "subspace"
    if solver not in ("eigh", "subspace") or (solver == "eigh" and not isinstance(w, jax.Array)):
        raise ValueError(f"solver: expected 'subspace', or 'eigh' for an array [n, n], got {solver!r}")
    dtype = jnp.dtype(jnp.float32) if callable(w) else working_dtype(*jax.tree.leaves(w))
    w = w.astype(dtype) if isinstance(w, jax.Array) else w
    product = affinity_product(w)
    degrees = product(jnp.ones((count, 1), dtype))
    scale = jnp.where(degrees > 0, jax.lax.rsqrt(jnp.where(degrees > 0, degrees, 1)), 0)
    if solver == "eigh":
        values, vectors = jnp.linalg.eigh(scale * w * scale.T)
        values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
        return SpectralEmbedding(vectors * canonical_signs(vectors)[None], values, jnp.zeros((), dtype))
    key = jax.random.key(0) if key is None else key
    found = top_eigenpairs(key, lambda v: scale * product(scale * v), count, k, dtype=dtype)
    return SpectralEmbedding(found.vectors, found.values, found.residual)


def spectral_clustering(
    key: jax.Array, w: Affinity, k: int, *, n: int | None = None, solver: str | None = None, restarts: int = 20
) -> SpectralClustering:
    """Clusters the nodes of a graph by k-means on the rows of their spectral embedding, each divided by its length.

    Args:
      key: Key of the starts.
      w: Affinities, see :func:`spectral_embedding`; so are ``n`` and ``solver``.
      k: Number of clusters and of eigenvectors.
      n: Number of nodes, where ``w`` is a function.
      solver: The eigensolver.
      restarts: Starts of k-means.

    Returns:
      The clusters and the embedding.

    Raises:
      ValueError: See :func:`spectral_embedding`.
    """
    of_solver, of_starts = jax.random.split(key)
    embedding = spectral_embedding(w, k, key=of_solver, n=n, solver=solver)
    found = kmeans(of_starts, unit_vectors(embedding.vectors), k, restarts=restarts)
    return SpectralClustering(found.assignments, embedding)


def eigengap(eigenvalues: np.ndarray) -> int:
    """Returns the number of clusters before the widest gap of ascending eigenvalues; from 1 to one less than given."""
    gaps = np.diff(np.asarray(eigenvalues))
    if not len(gaps):
        raise ValueError("eigenvalues: expected two or more, got one")
    return int(np.argmax(gaps)) + 1


def _check_affinity(w: Affinity, n: int | None) -> int:
    """Raises unless ``w`` can be an affinity; returns its number of nodes."""
    if isinstance(w, SparseRows):
        if w.idx.ndim != 2 or w.idx.shape != w.val.shape:
            raise ValueError(f"w: expected sparse rows [n, s], got {w.idx.shape} and {w.val.shape}")
        _check_values(w.val)
        return w.idx.shape[0]
    if callable(w):
        if n is None:
            raise ValueError("n: expected the number of nodes, for w is a function")
        return n
    if w.ndim != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(f"w: expected a square matrix [n, n], got {w.shape}")
    _check_values(w)
    if is_here(w):
        difference = float(jnp.max(jnp.abs(w - w.T)))
        if difference > _ASYMMETRY * max(float(jnp.max(w)), 1e-30):
            raise ValueError(
                f"w: expected a symmetric matrix, got one that differs from its transpose by {difference:g}"
            )
    return w.shape[0]


def _check_values(values: jax.Array) -> None:
    check_finite("w", values)
    if is_here(values) and float(jnp.min(values)) < 0:
        raise ValueError(f"w: expected affinities that are not negative, got {float(jnp.min(values)):g}")
