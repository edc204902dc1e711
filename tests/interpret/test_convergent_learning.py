"""Convergent learning: golden matchings, information, sparse maps and clusters, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg, metrics
from subspace_jax.interpret import convergent_learning as convergent
from subspace_jax.interpret.convergent_learning.information import one_hot_bins, unit_edges

update = jax.jit(convergent.unit_stats_update)
finalize = jax.jit(convergent.unit_stats_finalize)
correlation = jax.jit(convergent.between_correlation)
predict = jax.jit(convergent.sparse_predict_correlations, static_argnames=("max_iter", "tol"))
information = jax.jit(convergent.mutual_information_matrix, static_argnums=2, static_argnames="bias")
FOLDER = "convergent-learning"


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def streamed(x, y, sizes, dtype=jnp.float32):
    """Moments of batches of some sizes, padded to the largest."""
    stats, start, largest = convergent.unit_stats_init(x.shape[1], y.shape[1], dtype), 0, max(sizes)
    for size in sizes:
        rows, padding = slice(start, start + size), ((0, largest - size), (0, 0))
        # What is in the padding does not count.
        batch = [jnp.asarray(np.pad(a[rows], padding, constant_values=np.nan), dtype) for a in (x, y)]
        stats = update(stats, *batch, jnp.arange(largest) < size)
        start += size
    return finalize(stats)


def test_between_correlation_and_streamed_correlations_are_golden(golden, x64):
    g = golden(f"{FOLDER}/matching")
    x, y = jnp.asarray(g["X"]), jnp.asarray(g["Y"])
    found = streamed(g["X"], g["Y"], (70, 70, 40), jnp.float64)
    for name, value in (
        ("xy", correlation(x, y)),
        ("xx", correlation(x, x)),
        ("xw", correlation(x, jnp.asarray(g["W"]))),
    ):
        np.testing.assert_allclose(value, g[f"cor_{name}"], atol=1e-10)
    for name in ("cor_xx", "cor_xy", "cor_yy"):
        np.testing.assert_allclose(getattr(found, name), g[name], atol=1e-10)
    np.testing.assert_allclose(found.cov_xy, np.cov(g["X"].T, g["Y"].T, bias=True)[:15, 15:], atol=1e-12)
    np.testing.assert_allclose(found.std_y, g["Y"].std(0), atol=1e-12)
    assert found.count == 180


def test_matchings_and_loops_are_golden(golden, x64):
    g = golden(f"{FOLDER}/matching")
    semi, matched = (f(jnp.asarray(g["cor_xy"])) for f in (convergent.semi_match, convergent.max_match))
    for name, found in (("semi", semi), ("max", matched)):
        np.testing.assert_array_equal(found.columns, g[f"{name}_match"])
        np.testing.assert_allclose(found.values, g[f"{name}_values"], atol=1e-10)
        np.testing.assert_allclose(found.values.mean(), g[f"mean_{name}"], atol=1e-10)
    np.testing.assert_allclose(convergent.overlap(semi, matched), g["overlap_ratio"], atol=1e-7)
    # A permutation and its inverse are equally good within a network.
    within = convergent.max_match(jnp.asarray(g["cor_xx"]), within=True)
    own = g["cor_xx"][np.arange(15), g["within_match_no_diag"]]
    np.testing.assert_allclose(within.values.sum(), own.sum(), atol=1e-10)
    assert (within.columns != within.rows).all()
    assert (np.asarray(convergent.semi_match(jnp.asarray(g["cor_xx"]), within=True).columns) != np.arange(15)).all()
    order, lengths = convergent.follow_loops(g["max_match"])
    np.testing.assert_array_equal(order, g["loop_order"])
    np.testing.assert_array_equal(lengths, g["loop_lengths"])
    np.testing.assert_allclose(g["cor_xy"][order][:, order], g["cor_loop_permuted"], atol=1e-10)
    wide = convergent.max_match(jnp.asarray(g["cor_xw"]))
    np.testing.assert_array_equal(wide.rows, g["rect_rows"])
    np.testing.assert_array_equal(wide.columns, g["rect_cols"])


@pytest.mark.slow
def test_max_match_under_jit_is_that_of_the_host():
    c = jnp.asarray(gaussian(0, 6, 8), jnp.float32)
    compiled, host = jax.jit(convergent.max_match)(c), convergent.max_match(c)
    np.testing.assert_array_equal(compiled.columns, host.columns)
    # Of more rows than columns: the pairs are those of the transposed scores.
    tall = convergent.max_match(c.T)
    np.testing.assert_array_equal(np.sort(tall.columns), np.arange(6))
    np.testing.assert_allclose(tall.values.sum(), host.values.sum(), atol=1e-5)


def test_max_match_recovers_a_permuted_copy_and_beats_other_permutations(x64):
    x, perm = gaussian(0, 50, 8), np.random.default_rng(1).permutation(8)
    scales = np.linspace(0.1, 9, 8)
    copy = (x[:, perm] + 0.1 * gaussian(2, 50, 8)) * scales + 3
    c = correlation(jnp.asarray(x), jnp.asarray(copy))
    matched, semi = convergent.max_match(c), convergent.semi_match(c)
    np.testing.assert_array_equal(np.asarray(matched.columns)[perm], np.arange(8))
    assert convergent.overlap(semi, matched) == 1
    np.testing.assert_allclose(c, correlation(jnp.asarray(x), jnp.asarray(copy / scales)), atol=1e-12)
    noise = jnp.asarray(gaussian(3, 8, 8))
    best, greedy = convergent.max_match(noise).values, convergent.semi_match(noise).values
    assert greedy.mean() >= best.mean()
    for seed in range(20):
        other = np.random.default_rng(seed).permutation(8)
        assert best.sum() >= np.asarray(noise)[np.arange(8), other].sum()


def test_unit_stats_keep_the_digits_of_units_far_from_zero_and_see_constant_ones():
    x, y = gaussian(0, 300, 4), gaussian(1, 300, 3)
    y[:, :2] += x[:, :2]
    expected = np.corrcoef(x.T, y.T)[:4, 4:]
    x, y = (x + 1000).astype(np.float32), (y - 3000).astype(np.float32)
    found = streamed(x, y, (128, 128, 44))
    np.testing.assert_allclose(found.cor_xy, expected, atol=2e-3)
    x[:, 1] = 0.1
    found, whole = streamed(x, y, (128, 128, 44)), correlation(jnp.asarray(x), jnp.asarray(y))
    assert found.std_x[1] == 0
    assert (found.cor_xy[1] == 0).all()
    assert (whole[1] == 0).all()
    np.testing.assert_allclose(found.cor_xy, whole, atol=1e-5)


def test_between_correlation_takes_positions_of_a_convolution_as_examples():
    x = jnp.asarray(gaussian(0, 2, 3, 4, 5), jnp.float32)
    np.testing.assert_allclose(correlation(x, x), correlation(x.reshape(24, 5), x.reshape(24, 5)), atol=1e-6)


def test_unit_stats_of_bfloat16_are_accumulated_in_float32():
    x = jnp.asarray(gaussian(0, 60, 4), jnp.bfloat16)
    stats = update(convergent.unit_stats_init(4, 4), x, x)
    assert stats.xy.dtype == jnp.float32
    np.testing.assert_allclose(stats.xy, np.cov(np.asarray(x, np.float64).T) * 59, atol=1e-3)


@pytest.mark.eight_devices
def test_unit_stats_of_eight_devices_are_those_of_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, y = (jnp.asarray(gaussian(seed, 160, p) + 50, jnp.float32) for seed, p in ((0, 4), (1, 3)))
    one = update(convergent.unit_stats_init(4, 3), x, y)

    def local(x, y):
        stats = convergent.unit_stats_init(4, 3)
        stats = jax.tree.map(lambda a: jax.lax.pcast(a, "data", to="varying"), stats)
        for rows in (slice(0, 12), slice(12, 20)):
            stats = convergent.unit_stats_update(stats, x[rows], y[rows])
        return linalg.psum_pair_moments(stats, "data")

    summed = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P()))(x, y)
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    sharded = update(convergent.unit_stats_init(4, 3), *jax.device_put((x, y), sharding))
    for other in (summed, sharded):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-3), other, one)


def test_mutual_information_is_golden(golden, x64):
    g = golden(f"{FOLDER}/mutual_information")
    bins = int(g["num_bins"])
    x, y = jnp.asarray(g["X"]), jnp.asarray(g["Y"])
    for name, bias in (("mi_nats", "none"), ("mi_bias_corrected", "reference")):
        found = information(x, y, bins, bias=bias)
        np.testing.assert_allclose(found[tuple(g["pairs"].T)], g[name], atol=1e-9)
    of = jax.jit(lambda v: (unit_edges(v, bins), one_hot_bins(v, unit_edges(v, bins))))
    for (i, j), edges_x, edges_y, hist in zip(g["pairs"], g["x_edges"], g["y_edges"], g["hist"], strict=True):
        (own_x, ones_x), (own_y, ones_y) = of(x[:, i]), of(y[:, j])
        np.testing.assert_allclose(own_x, edges_x, atol=1e-9)
        np.testing.assert_allclose(own_y, edges_y, atol=1e-9)
        joint = np.asarray(ones_x.T @ ones_y)
        np.testing.assert_allclose(joint / joint.sum(), hist / hist.sum(), atol=1e-9)


@pytest.mark.slow
def test_mutual_information_without_bias_is_near_0_for_independent_units_and_0_for_dead_ones():
    x, y = (np.maximum(gaussian(seed, 180, 15), 0) for seed in (0, 1))
    x[:, 0] = 0
    found = np.asarray(information(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), 6, bias="miller_madow"))
    # A unit that is off in half the examples fills fewer cells than the bias counts.
    assert abs(found[1:].mean()) < 0.03
    plain = np.asarray(information(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), 6, bias="none"))
    np.testing.assert_allclose(plain[0], 0, atol=1e-5)
    assert plain[1:].mean() > 0.03


def test_sparse_predict_is_golden(golden, x64):
    g = golden(f"{FOLDER}/lasso")
    x, y = jnp.asarray(g["X"]), jnp.asarray(g["Y"])
    cor_xx, cor_xy = correlation(x, x), correlation(x, y)
    for i, lam in enumerate(g["lambdas"]):
        found = predict(cor_xx, cor_xy, lam, tol=1e-8)
        assert found.residual < 1e-8
        np.testing.assert_allclose(found.w, g["W"][i], atol=1e-5)
        np.testing.assert_allclose(found.loss.mean(), g["half_mse"][i], atol=1e-6)
        np.testing.assert_allclose(1 - 2 * found.loss, g["unit_r2"][i], atol=1e-5)
        assert found.nnz == g["nonzeros"][i]


def test_sparse_predict_standardizes_activations_in_any_units(golden, x64):
    g = golden(f"{FOLDER}/lasso")
    x, y = jnp.asarray(3 * g["X"] + 5), jnp.asarray(0.1 * g["Y"])
    found = jax.jit(convergent.sparse_predict)(x, y, g["lambdas"][4])
    assert found.residual < 1e-5
    np.testing.assert_allclose(found.w, g["W"][4], atol=1e-4)


def test_sparse_predict_is_0_for_large_penalties_and_least_squares_for_none(x64):
    x, y = gaussian(0, 180, 15), gaussian(1, 180, 15)
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x, y))
    cxx, cxy = jnp.asarray(x.T @ x / 180), jnp.asarray(x.T @ y / 180)
    nothing = predict(cxx, cxy, float(jnp.abs(cxy).max()))
    assert nothing.nnz == 0
    np.testing.assert_allclose(nothing.loss, 0.5)
    np.testing.assert_allclose(predict(cxx, cxy, 0.0, tol=1e-8).w, np.linalg.lstsq(x, y)[0], atol=1e-6)


def test_sparse_predict_in_float32_is_certified():
    x, y = gaussian(0, 180, 15), gaussian(1, 180, 15)
    cxx, cxy = (jnp.asarray(np.corrcoef(a.T, b.T)[:15, 15:], jnp.float32) for a, b in ((x, x), (x, y)))
    assert predict(cxx, cxy, 0.01).residual < 1e-5


def test_bipartite_spectral_and_ward_cluster_are_golden(golden, x64):
    g = golden(f"{FOLDER}/spectral")
    a, k = jnp.abs(jnp.asarray(g["cor_xy"])), int(g["k"])
    np.testing.assert_allclose(np.r_[a.sum(1), a.sum(0)], g["degree"], atol=1e-8)
    few, every = convergent.bipartite_spectral(a, k), convergent.bipartite_spectral(a, 30)
    np.testing.assert_allclose(every.eigenvalues, g["laplacian_eigenvalues"], atol=1e-8)
    np.testing.assert_allclose(1 - few.eigenvalues, g["affinity_normalised_singular_values"][:k], atol=1e-8)
    np.testing.assert_allclose(few.embedding @ few.embedding.T, g["spectral_projector"], atol=1e-8)
    labels = convergent.ward_cluster(few.embedding, k)
    np.testing.assert_array_equal(labels[:, None] == labels[None], g["coassignment"])
    both = convergent.cluster_units(jnp.asarray(g["cor_xy"]), k)
    np.testing.assert_array_equal(np.r_[both.labels_x, both.labels_y], labels)


def test_bipartite_spectral_has_the_eigenvectors_of_the_whole_laplacian_also_of_other_widths(x64):
    a = np.abs(gaussian(0, 3, 5))
    a[1] = 0  # a unit without affinity
    found = convergent.bipartite_spectral(jnp.asarray(a), 8)
    w = np.block([[np.zeros((3, 3)), a], [a.T, np.zeros((5, 5))]])
    scale = np.where(w.sum(1) > 0, 1 / np.sqrt(np.maximum(w.sum(1), 1e-30)), 0)
    laplacian = np.eye(8) - scale[:, None] * w * scale
    np.testing.assert_allclose(laplacian @ found.embedding, found.embedding * found.eigenvalues[None], atol=1e-12)
    np.testing.assert_allclose(found.embedding.T @ found.embedding, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(laplacian), atol=1e-12)


def test_cluster_units_finds_planted_groups_by_the_eigengap(x64):
    groups = np.repeat(np.arange(3), [4, 5, 6])
    other = groups[np.random.default_rng(0).permutation(15)][:12]
    c = np.where(groups[:, None] == other[None], 0.8, 0.05) * np.sign(gaussian(0, 15, 12))
    found = convergent.cluster_units(jnp.asarray(c))
    labels = np.r_[found.labels_x, found.labels_y]
    np.testing.assert_array_equal(
        labels[:, None] == labels[None], np.r_[groups, other][:, None] == np.r_[groups, other]
    )


def test_every_public_name_of_the_method_exists():
    own = (
        "unit_stats_init unit_stats_update unit_stats_finalize between_correlation semi_match max_match follow_loops "
        "mutual_information_matrix sparse_predict SparseMap bipartite_spectral ward_cluster compare"
    )
    for module, names in (
        (convergent, own),
        (linalg, "cca CCAResult"),
        (metrics, "svcca pwcca cca_mean linear_cka kernel_cka procrustes_similarity linear_regression_r2"),
    ):
        assert set(names.split()) <= set(module.__all__)


ONES = jnp.ones((6, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convergent.between_correlation(ONES, ONES[:5]), r"x, y: expected \[..., p\] and \[..., q\]"),
        (lambda: convergent.between_correlation(ONES[:0], ONES[:0]), r"x, y: expected \[..., p\] and \[..., q\]"),
        (lambda: convergent.unit_stats_init(0, 2), "p, q: expected at least one unit each"),
        (lambda: convergent.unit_stats_update(convergent.unit_stats_init(3, 2), ONES, ONES), r"expected \[..., 3\]"),
        (
            lambda: convergent.unit_stats_update(convergent.unit_stats_init(2, 2), ONES, ONES, jnp.ones(5)),
            r"mask: expected \(6,\), got \(5,\)",
        ),
        (lambda: convergent.semi_match(jnp.ones(3)), r"c: expected scores \[p, q\]"),
        (lambda: convergent.max_match(ONES, within=True), "p = q"),
        (lambda: convergent.max_match(jnp.ones((1, 1)), within=True), "c: expected two units or more"),
        (lambda: convergent.max_match(ONES * jnp.nan), "c: expected finite scores"),
        (lambda: convergent.follow_loops([0, 0, 1]), "pi: expected a permutation of 0 to 2"),
        (lambda: convergent.mutual_information_matrix(ONES, ONES[:5]), "of the same examples"),
        (lambda: convergent.mutual_information_matrix(ONES, ONES, 1), "bins: expected at least 2, got 1"),
        (lambda: convergent.mutual_information_matrix(ONES, ONES, bias="no"), "bias: expected miller_madow"),
        (lambda: convergent.sparse_predict(ONES, ONES, -1.0), "lam: expected 0 or more, got -1"),
        (lambda: convergent.sparse_predict(ONES, ONES[:5], 0.1), "of the same examples"),
        (lambda: convergent.sparse_predict_correlations(ONES, ONES, 0.1), r"expected \[p, p\] and \[p, q\]"),
        (lambda: convergent.bipartite_spectral(ONES, 0), "k: expected 1 to 8, the number of units, got 0"),
        (lambda: convergent.bipartite_spectral(ONES, 9), "k: expected 1 to 8, the number of units, got 9"),
        (lambda: convergent.ward_cluster(np.ones((3, 2)), 4), "k: expected 1 to the number of units, got 4"),
        (lambda: convergent.ward_cluster(np.full((3, 2), np.nan), 2), "embedding: expected finite numbers"),
        (lambda: convergent.eigengap([0.0]), "eigenvalues: expected two or more"),
    ],
)
def test_convergent_learning_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
