"""Leading eigenpairs by products alone, sparse rows, and spectral clustering of dense and sparse graphs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg
from subspace_jax.linalg import SparseRows

N = 60


def graph(seed=0, parts=3):
    """Sparse rows of a graph of so many parts that hang together loosely, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(N) % parts
    idx = np.stack([rng.choice(np.flatnonzero(labels == label), 5, replace=False) for label in labels])
    strange = rng.random((N, 5)) < 0.05
    idx = np.where(strange, rng.integers(N, size=(N, 5)), idx).astype(np.int32)
    return SparseRows(jnp.asarray(idx), jnp.asarray(rng.uniform(0.5, 1, (N, 5)).astype(np.float32))), labels


def test_products_of_sparse_rows_are_those_of_the_matrix():
    z, _ = graph()
    v = jnp.asarray(np.random.default_rng(1).standard_normal((N, 3)).astype(np.float32))
    dense = np.zeros((N, N), np.float32)
    np.add.at(dense, (np.arange(N)[:, None], np.asarray(z.idx)), np.asarray(z.val))  # places may repeat
    np.testing.assert_allclose(linalg.dense_rows(z), dense, atol=1e-6)
    np.testing.assert_allclose(linalg.sparse_times(z, v), dense @ v, atol=1e-4)
    np.testing.assert_allclose(linalg.sparse_transpose_times(z, v), dense.T @ v, atol=1e-4)
    np.testing.assert_allclose(linalg.affinity_product(z)(v), (dense + dense.T) @ v, atol=1e-4)


def test_solvers_agree_on_a_sparse_graph_and_find_its_parts():
    z, labels = graph()
    w = linalg.dense_rows(z) + linalg.dense_rows(z).T
    dense = linalg.spectral_embedding(w, 3)
    sparse = jax.jit(lambda z: linalg.spectral_clustering(jax.random.key(0), z, 3))(z)
    np.testing.assert_allclose(sparse.embedding.eigenvalues, dense.eigenvalues, atol=1e-5)
    projectors = [np.asarray(e.vectors @ e.vectors.T) for e in (dense, sparse.embedding)]
    np.testing.assert_allclose(*projectors, atol=1e-4)
    assert sparse.embedding.residual < 2e-5
    assert (np.abs(sparse.embedding.vectors).max(0) == sparse.embedding.vectors.max(0)).all()
    assert all(len(np.unique(np.asarray(sparse.assignments)[labels == label])) == 1 for label in range(3))
    assert len(np.unique(sparse.assignments)) == 3


def test_top_eigenpairs_finds_eigenvalues_of_any_multiplicity(x64):
    # Three unconnected cliques: the eigenvalue 1 three times.
    w = jnp.kron(jnp.eye(3), jnp.ones((7, 7)) / 7)
    found = jax.jit(lambda w: linalg.top_eigenpairs(jax.random.key(0), lambda v: w @ v, 21, 4, dtype=jnp.float64))(w)
    np.testing.assert_allclose(found.values, [1, 1, 1, 0], atol=1e-10)
    np.testing.assert_allclose(found.vectors[:, :3] @ found.vectors[:, :3].T, w, atol=1e-9)
    assert found.residual < 1e-10
    assert found.products > 1


def test_an_isolated_node_has_a_finite_embedding():
    w = jnp.zeros((5, 5)).at[:4, :4].set(1.0)
    found = linalg.spectral_embedding(w, 1)
    np.testing.assert_allclose(found.vectors[:, 0], [0.5, 0.5, 0.5, 0.5, 0], atol=1e-6)


W = np.ones((3, 3), np.float32)


@pytest.mark.parametrize(
    ("w", "options", "error"),
    [
        (W[:2], {}, r"w: expected a square matrix \[n, n\], got \(2, 3\)"),
        (W * np.nan, {}, "w: expected finite numbers, got NaN"),
        (-W, {}, "w: expected affinities that are not negative, got -1"),
        (W + np.triu(W) * 1e-3, {}, "w: expected a symmetric matrix, got one that differs from its transpose by 0.001"),
        (W, {"k": 0}, "k: expected 1 to 3, the number of nodes, got 0"),
        (W, {"k": 4}, "k: expected 1 to 3, the number of nodes, got 4"),
        (W, {"solver": "magic"}, "solver: expected 'subspace', or 'eigh'"),
        (lambda v: v, {}, "n: expected the number of nodes"),
        (lambda v: v, {"n": 3, "solver": "eigh"}, "solver: expected 'subspace'"),
        (SparseRows(W[:, 0].astype(int), W), {}, r"w: expected sparse rows \[n, s\]"),
    ],
)
def test_spectral_embedding_refuses_what_can_not_serve(w, options, error):
    with pytest.raises(ValueError, match=error):
        linalg.spectral_embedding(w, **{"k": 1, **options})


def test_top_eigenpairs_refuses_more_pairs_than_rows():
    with pytest.raises(ValueError, match="k: expected 1 to 5, the number of rows, got 6"):
        linalg.top_eigenpairs(jax.random.key(0), lambda v: v, 5, 6)


def test_top_eigenpairs_refuses_half_precision():
    with pytest.raises(TypeError, match="dtype: expected float32 or float64, got bfloat16"):
        linalg.top_eigenpairs(jax.random.key(0), lambda v: v, 5, 2, dtype=jnp.bfloat16)


def test_map_row_blocks_and_top_entries_refuse_what_can_not_serve():
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        linalg.map_row_blocks(lambda x: x, jnp.ones((3, 2)), 0)
    with pytest.raises(ValueError, match="count: expected 1 to 2, the number of columns, got 3"):
        linalg.top_entries(jnp.ones((3, 2)), 3)
