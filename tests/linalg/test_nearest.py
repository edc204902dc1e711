"""Distances, nearest rows, k-means and Procrustes: definitions, blocks, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg


def vectors(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def by_sorting(queries, rows, k, exclude=None):
    distances = np.square(np.asarray(queries)[:, None] - np.asarray(rows)[None]).sum(-1)
    if exclude is not None:
        distances[np.arange(len(queries)), exclude] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


def test_pairwise_sq_distances_are_those_of_differences_and_never_negative():
    a, b = vectors(0, 7, 5), vectors(1, 9, 5)
    wanted = np.square(np.asarray(a)[:, None] - np.asarray(b)[None]).sum(-1)
    chex.assert_trees_all_close(linalg.pairwise_sq_distances(a, b), wanted, rtol=1e-5, atol=1e-5)
    far = 1000 + vectors(0, 50, 5)
    assert float(jnp.min(linalg.pairwise_sq_distances(far, far))) >= 0


@pytest.mark.parametrize(("num_queries", "block_size"), [(7, 4096), (7, 10), (1030, 64)])
def test_nearest_rows_finds_what_sorting_finds_whatever_the_blocks(num_queries, block_size):
    queries, rows = vectors(0, num_queries, 5), vectors(1, 103, 5)
    distances, index = linalg.nearest_rows(queries, rows, 4, block_size=block_size)
    wanted, order = by_sorting(queries, rows, 4)
    np.testing.assert_array_equal(index, order)
    chex.assert_trees_all_close(distances, wanted, rtol=1e-5, atol=1e-5)


def test_nearest_rows_leaves_out_excluded_rows_and_says_where_none_is_left():
    rows = vectors(0, 12, 3)
    _, index = linalg.nearest_rows(rows, rows, 3, exclude=jnp.arange(12), block_size=5)
    np.testing.assert_array_equal(index, by_sorting(rows, rows, 3, np.arange(12))[1])
    distances, index = linalg.nearest_rows(rows[:1], rows[:2], 2, exclude=jnp.asarray([1]))
    assert index.tolist() == [[0, 2]]
    assert np.isinf(distances[0, 1])


def test_nearest_rows_prefers_the_lower_index_of_equal_rows():
    rows = jnp.ones((9, 2)).at[4:].set(2.0)
    _, index = linalg.nearest_rows(jnp.full((1, 2), 2.0), rows, 6, block_size=4)
    assert index.tolist() == [[4, 5, 6, 7, 8, 0]]


def test_memory_of_nearest_rows_is_that_of_a_block():
    queries, rows = (jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (4096, 20_000))
    search = jax.jit(functools.partial(linalg.nearest_rows, k=10, block_size=512))
    memory = search.lower(queries, rows).compile().memory_analysis().temp_size_in_bytes
    # A few arrays of 1024 x 512, and copies of both matrices; all distances take 328 MB.
    assert memory < 12e6


@pytest.mark.eight_devices
def test_nearest_rows_shares_sharded_queries_among_the_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    queries, rows = vectors(0, 2048, 5), vectors(1, 103, 5)
    placed = jax.device_put(queries, NamedSharding(mesh, P("data")))
    everywhere = jax.device_put(rows, NamedSharding(mesh, P()))
    search = jax.jit(functools.partial(linalg.nearest_rows, k=3))
    compiled = search.lower(placed, everywhere).compile()
    np.testing.assert_array_equal(compiled(placed, everywhere)[1], search(queries, rows)[1])
    one = search.lower(queries, rows).compile().cost_analysis()["flops"]
    assert compiled.cost_analysis()["flops"] < 0.2 * one  # an eighth, and what all devices do with the rows


def test_kmeans_finds_separated_clusters_and_their_means():
    centers = 20 * vectors(0, 6, 4)
    labels = np.repeat(np.arange(6), 30)
    x = 100 + centers[labels] + 0.5 * vectors(1, 180, 4)
    found = jax.jit(functools.partial(linalg.kmeans, k=6, restarts=4))(jax.random.key(0), x)
    same = np.asarray(found.assignments)[:, None] == np.asarray(found.assignments)
    np.testing.assert_array_equal(same, labels[:, None] == labels)
    means = np.stack([np.asarray(x)[np.asarray(found.assignments) == c].mean(0) for c in range(6)])
    chex.assert_trees_all_close(found.centers, means, rtol=1e-5)
    spread = sum(np.square(np.asarray(x)[labels == c] - np.asarray(x)[labels == c].mean(0)).sum() for c in range(6))
    assert float(found.inertia) == pytest.approx(spread, rel=1e-3)


def test_kmeans_is_as_good_as_scikit_learn_on_digits():
    from sklearn import cluster, datasets

    x = datasets.load_digits().data.astype(np.float32)
    peer = cluster.KMeans(10, n_init=4, random_state=0).fit(x)
    found = jax.jit(functools.partial(linalg.kmeans, k=10, restarts=4))(jax.random.key(0), x)
    assert float(found.inertia) < 1.01 * peer.inertia_  # local minima of either differ by some tenths of a percent


def test_kmeans_bears_fewer_distinct_rows_than_clusters():
    found = linalg.kmeans(jax.random.key(0), jnp.tile(vectors(0, 2, 3), (4, 1)), 5)
    assert float(found.inertia) == pytest.approx(0, abs=1e-5)
    chex.assert_tree_all_finite(found.centers)


def test_orthogonal_procrustes_gives_the_golden_map_and_recovers_a_rotation(x64, golden):
    pairs = golden("lambda-orthogonality/training")
    got = linalg.orthogonal_procrustes(jnp.asarray(pairs["h_new"]), jnp.asarray(pairs["h_old"]))
    chex.assert_trees_all_close(got, jnp.asarray(pairs["procrustes"]), atol=1e-8)
    x, q = pairs["h_new"], np.linalg.qr(np.random.default_rng(0).standard_normal((7, 7)))[0]
    chex.assert_trees_all_close(linalg.orthogonal_procrustes(jnp.asarray(x), jnp.asarray(x @ q)), q, atol=1e-10)


def test_orthogonal_procrustes_between_widths_is_semi_orthogonal():
    q = linalg.orthogonal_procrustes(vectors(0, 20, 6), vectors(1, 20, 4))
    chex.assert_trees_all_close(q.T @ q, jnp.eye(4), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: linalg.pairwise_sq_distances(x, x[:, :2]), "one width"),
        (lambda x: linalg.nearest_rows(x, x[:, :2], 1), "one width"),
        (lambda x: linalg.nearest_rows(x, x, 6), "k: expected 1 to 5, the number of rows, got 6"),
        (lambda x: linalg.kmeans(jax.random.key(0), x, 0), "k: expected 1 to 5"),
        (lambda x: linalg.kmeans(jax.random.key(0), x[0], 1), "x: expected"),
        (lambda x: linalg.kmeans(jax.random.key(0), x, 2, restarts=0), "restarts, max_steps"),
        (lambda x: linalg.orthogonal_procrustes(x, x[:3]), "x, y: expected pairs"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors(0, 5, 3))


def test_smallest_entries_by_groups_are_those_of_a_sort_ties_included():
    from subspace_jax.linalg.nearest import _smallest

    x = np.random.default_rng(0).integers(0, 40, (5, 512)).astype(np.float32)
    values, at = jax.jit(_smallest, static_argnums=1)(x, 6)
    order = np.argsort(x, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(at, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))
