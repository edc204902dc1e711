"""Classical subspace clustering: golden vectors, optimality conditions, blocks, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics
from subspace_jax.cluster import classical

PUBLIC = {
    classical: "LRR LSR SSC SSCOMP TSC KMeans KSubspaces SpectralClustering affinity_from_coefficients elastic_net_sc "
    "keep_top_coefficients lrr lrr_l21 lsr ssc_omp tsc neighbor_affinity",
    linalg: "KMeans KSubspaces SparseRows k_subspaces kmeans projector_distance spectral_clustering spectral_embedding",
    metrics: "ClusterScores adjusted_mutual_info adjusted_rand_index best_label_map cluster_scores clustering_accuracy "
    "connectivity contingency match_subspaces matched_macro_f1 normalized_mutual_info pair_f_score purity "
    "subspace_preserving_error",
}


def test_every_public_name_of_the_specification_exists():
    for module, names in PUBLIC.items():
        assert set(names.split()) <= set(module.__all__)


@pytest.fixture(scope="module")
def pieces():
    from tests.conftest import GOLDEN

    with np.load(GOLDEN / "clustering-common" / "pieces.npz") as archive:
        return dict(archive)


def run(f, x, **options):
    return jax.jit(functools.partial(f, **options))(x)


# 10 does not divide 42 rows.
@pytest.mark.parametrize("block_size", [pytest.param(None, marks=pytest.mark.slow), 10])
def test_coefficients_are_the_golden_ones(block_size, pieces, x64):
    x, dense = jnp.asarray(pieces["X"]), linalg.dense_rows
    steps, threshold = int(pieces["omp_params"][0]), float(pieces["omp_params"][1])
    found = {
        "omp_C": dense(
            run(classical.ssc_omp, x, nonzeros=steps, threshold=threshold, stop="toolbox", block_size=block_size)
        ),
        "lsr_C_gamma10": run(classical.lsr, x, gamma=10.0, zero_diagonal=False, block_size=block_size),
        "lsr_nodiag_C": run(classical.lsr, x, gamma=1 / 0.1, block_size=block_size),
        "lrr_clean_C": run(classical.lrr, x, block_size=block_size),
        "lrr_noisy_C": run(classical.lrr, x, noise=float(pieces["lrr_noisy_tau"]), block_size=block_size),
    }
    z = dense(run(classical.tsc, x, q=int(pieces["tsc_q"]), block_size=block_size))
    found["tsc_A"] = z + z.T
    for name, value in found.items():
        np.testing.assert_allclose(value, pieces[name], atol=1e-8, err_msg=name)
    error = metrics.subspace_preserving_error(found["omp_C"], jnp.asarray(pieces["y"]))
    np.testing.assert_allclose(error, pieces["omp_subspace_preserving_error"], atol=1e-9)


@pytest.mark.parametrize(("tau", "block_size"), [pytest.param(1.0, None, marks=pytest.mark.slow), (0.9, 10)])
def test_elastic_nets_are_the_golden_ones_and_optimal(tau, block_size, pieces, x64):
    x = pieces["X"]
    found = run(classical.elastic_net_sc, jnp.asarray(x), tau=tau, keep=42, block_size=block_size)
    c, alpha = np.asarray(linalg.dense_rows(found.coefficients)), np.asarray(found.alpha)
    np.testing.assert_allclose(c, pieces[f"ensc_tau{tau}_C"], atol=1e-5)
    np.testing.assert_allclose(alpha, pieces[f"ensc_tau{tau}_alpha"], rtol=1e-9)
    slopes = (x - c @ x) @ x.T / alpha[:, None]
    on, others = c != 0, ~np.eye(42, dtype=bool)
    assert np.abs(slopes[~on & others]).max() <= tau + 1e-4
    np.testing.assert_allclose(slopes[on], (tau * np.sign(c) + (1 - tau) * c)[on], atol=1e-4)
    assert found.violation.max() < 1e-4


@pytest.mark.slow
def test_elastic_nets_of_few_candidates_are_those_of_all_in_float32(pieces):
    x = jnp.asarray(pieces["X"], jnp.float32)
    found = run(classical.elastic_net_sc, x, tau=0.9, keep=20, candidates=20)
    assert found.coefficients.idx.shape == (42, 20)
    assert found.violation.max() < 1e-3
    np.testing.assert_allclose(linalg.dense_rows(found.coefficients), pieces["ensc_tau0.9_C"], atol=2e-4)


def affinities(pieces):
    coefficients = {"omp": "omp_C", "lsr": "lsr_nodiag_C", "ensc": "ensc_tau0.9_C"}
    found = {name: classical.affinity_from_coefficients(jnp.asarray(pieces[c])) for name, c in coefficients.items()}
    return found | {"tsc": jnp.asarray(pieces["tsc_A"])}


def test_spectral_clustering_of_golden_affinities_has_the_projectors_and_accuracy_one(pieces, x64):
    cluster = jax.jit(lambda w: linalg.spectral_clustering(jax.random.key(0), w, 3))
    values = jax.jit(lambda w: linalg.spectral_embedding(w, 4).eigenvalues)
    for name, w in affinities(pieces).items():
        found = cluster(w)
        vectors = np.asarray(found.embedding.vectors)
        np.testing.assert_allclose(values(w), pieces[f"spec_{name}_eigs"], atol=1e-8)
        np.testing.assert_allclose(vectors @ vectors.T, pieces[f"spec_{name}_projector"], atol=1e-8)
        accuracy = metrics.clustering_accuracy(pieces["y"], found.assignments)
        assert accuracy == pieces[f"spec_{name}_acc"] == 1


def test_affinity_of_sparse_coefficients_is_that_of_dense_ones(pieces):
    c = jnp.asarray(pieces["lsr_nodiag_C"], jnp.float32)
    z = classical.affinity_from_coefficients(c, keep=42)
    np.testing.assert_allclose(
        linalg.dense_rows(z) + linalg.dense_rows(z).T, classical.affinity_from_coefficients(c), atol=1e-6
    )
    top = classical.keep_top_coefficients(c, 5)
    assert (jnp.abs(linalg.dense_rows(top)) > 0).sum() == 5 * 42
    assert jnp.abs(top.val).min(1).max() <= jnp.abs(c).max()
    zero = classical.affinity_from_coefficients(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(zero, 0)


def subspaces(seed, width, dim, count, each):
    """Rows of unit length on ``count`` random subspaces, and labels."""
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.standard_normal((count, width, dim)))[0]
    x = np.concatenate([rng.standard_normal((each, dim)) @ basis.T for basis in bases])
    return x / np.linalg.norm(x, axis=1, keepdims=True), np.repeat(np.arange(count), each), bases


def test_least_squares_on_independent_subspaces_is_block_diagonal(x64):
    x, y, _ = subspaces(0, 12, 3, 3, 8)
    c = np.asarray(classical.lsr(jnp.asarray(x), 1e8))
    assert np.abs(c[y[:, None] != y[None]]).max() < 1e-6 < np.abs(c).max()


def test_low_rank_coefficients_are_a_projector_and_meet_the_certificate(x64):
    x, _, _ = subspaces(0, 12, 3, 3, 8)
    c = np.asarray(classical.lrr(jnp.asarray(x)))
    np.testing.assert_allclose(c @ c, c, atol=1e-8)
    np.testing.assert_allclose(c @ x, x, atol=1e-8)
    noise = 0.3
    noisy = x + 0.1 * np.random.default_rng(1).standard_normal(x.shape)
    c = np.asarray(classical.lrr(jnp.asarray(noisy), noise))
    gradient = (noisy - c @ noisy) @ noisy.T / noise
    values, vectors = np.linalg.eigh(c)
    kept = vectors[:, values > 1e-9]
    assert 0 < kept.shape[1] < 12
    np.testing.assert_allclose(kept.T @ gradient @ kept, np.eye(kept.shape[1]), atol=1e-6)
    assert np.linalg.norm(gradient, 2) <= 1 + 1e-6


def test_robust_low_rank_coefficients_meet_the_conditions_of_an_optimum(x64):
    x, _, _ = subspaces(0, 12, 2, 3, 8)
    x = x + 0.05 * np.random.default_rng(0).standard_normal(x.shape)
    gamma = 8.0
    found = classical.lrr_l21(jnp.asarray(x), gamma)
    c, errors = np.asarray(found.coefficients), np.asarray(found.errors)
    np.testing.assert_allclose(c @ x + errors, x, atol=1e-7)
    lengths = np.linalg.norm(errors, axis=1, keepdims=True)
    assert lengths.min() > 1e-3  # so that the multipliers are known
    penalty = gamma / np.linalg.norm((x / np.linalg.norm(x, axis=1, keepdims=True)).T @ x, 2)
    product = penalty * errors / lengths @ x.T
    assert np.linalg.norm(product, 2) <= 1 + 1e-4
    np.testing.assert_allclose(np.sum(product * c), np.linalg.svd(c)[1].sum(), rtol=1e-4)
    assert np.linalg.matrix_rank(c, tol=1e-5) < 12
    kept = classical.lrr_l21(jnp.asarray(x), gamma, keep=24, block_size=10).coefficients
    np.testing.assert_allclose(linalg.dense_rows(kept), c, atol=1e-9)


@pytest.mark.slow
def test_robust_low_rank_errors_are_those_of_wrong_rows():
    x, _, _ = subspaces(3, 20, 2, 3, 30)
    x[[4, 40, 77]] = subspaces(4, 20, 20, 1, 3)[0]
    lengths = np.linalg.norm(run(classical.lrr_l21, x.astype(np.float32), gamma=12.0).errors, axis=1)
    assert sorted(np.argsort(-lengths)[:3]) == [4, 40, 77]
    assert np.sort(lengths)[-3] > 5 * np.sort(lengths)[-4]


def test_matching_pursuit_leaves_what_is_orthogonal_to_its_rows_and_finds_orthogonal_subspaces(x64):
    x, y, _ = subspaces(2, 9, 3, 3, 8)
    z = run(classical.ssc_omp, jnp.asarray(x), nonzeros=2)
    residual = x - np.asarray(linalg.dense_rows(z)) @ x
    assert np.abs(np.einsum("nd,nsd->ns", residual, x[np.asarray(z.idx)])).max() < 1e-6 < np.abs(residual).max()
    blocks = np.kron(np.eye(3), np.ones((8, 3)))
    orthogonal = np.random.default_rng(0).standard_normal((24, 9)) * blocks
    z = run(classical.ssc_omp, jnp.asarray(orthogonal), nonzeros=2)
    assert metrics.subspace_preserving_error(z, jnp.asarray(y)) == 0


def test_matching_pursuit_ends_at_a_duplicate_and_a_row_of_zeros_has_no_neighbour():
    x = np.asarray([[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 3, 4], [0, 4, 3], [1, 1, 1]], np.float32)
    z = classical.ssc_omp(jnp.asarray(x), 3)
    np.testing.assert_allclose(z.val[:3], [[1, 0, 0], [1, 0, 0], [0, 0, 0]], atol=1e-6)
    assert z.idx[:2, 0].tolist() == [1, 0]


def test_blocks_that_do_not_divide_the_rows_change_no_sparse_row(pieces):
    x = jnp.asarray(pieces["X"], jnp.float32)
    whole, blocks = (run(classical.lsr, x, keep=5, block_size=size) for size in (42, 16))
    np.testing.assert_array_equal(whole.idx, blocks.idx)
    np.testing.assert_allclose(whole.val, blocks.val, atol=1e-5)


def test_neighbor_affinity_is_scikit_learns_graph(pieces):
    from sklearn.neighbors import kneighbors_graph

    x = pieces["X"].astype(np.float32)
    z = np.asarray(linalg.dense_rows(classical.neighbor_affinity(jnp.asarray(x), 4)))
    graph = kneighbors_graph(x, 4).toarray()
    np.testing.assert_array_equal(z + z.T, (graph + graph.T) / 2)


X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
NAN = np.where(np.eye(6, 3) > 0, np.nan, X).astype(np.float32)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: classical.tsc(NAN, 2), "x: expected finite numbers, got NaN"),
        (lambda: classical.tsc(X, 6), "q: expected 1 to 5, one less than the number of rows, got 6"),
        (lambda: classical.tsc(X[:1], 1), "x: expected at least 2 rows, got 1"),
        (lambda: classical.lsr(X[0]), r"x: expected rows \[n, features\], got shape"),
        (lambda: classical.lsr(X, 0.0), "gamma: expected more than 0"),
        (lambda: classical.lsr(X, keep=7), "keep: expected 1 to 6"),
        (lambda: classical.lsr(X, block_size=0), "block_size: expected at least 1"),
        (lambda: classical.lrr(X, -1.0), "noise: expected 0 or more"),
        (lambda: classical.lrr_l21(X, 1.0), "gamma: expected more than 1, got 1.0"),
        (lambda: classical.lrr_l21(X, tolerance=0.0), "tolerance: expected more than 0, got 0.0"),
        (lambda: classical.ssc_omp(X, 6), "nonzeros: expected 1 to 5"),
        (lambda: classical.ssc_omp(X, 2, stop="never"), "stop: expected 'relative' or 'toolbox', got 'never'"),
        (lambda: classical.elastic_net_sc(X, 1.0), "gamma: expected more than 1"),
        (lambda: classical.elastic_net_sc(X, tau=0.0), "tau: expected more than 0"),
        (lambda: classical.elastic_net_sc(X, keep=7), "keep, candidates: expected 1 to 6"),
        (lambda: classical.neighbor_affinity(X, 6), "q: expected 1 to one less"),
        (lambda: classical.keep_top_coefficients(X, 2), r"c: expected a square matrix \[n, n\]"),
        (lambda: classical.affinity_from_coefficients(X), r"c: expected a square matrix \[n, n\]"),
        (
            lambda: classical.affinity_from_coefficients(linalg.SparseRows(X, X), 2),
            "keep: expected None for sparse coefficients",
        ),
    ],
)  # fmt: skip
def test_self_expression_refuses_what_can_not_serve(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_self_expression_refuses_integers():
    with pytest.raises(TypeError, match="x: expected floating point, got int32"):
        classical.lsr(np.ones((3, 2), np.int32))
