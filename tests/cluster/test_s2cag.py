"""S2CAG: golden vectors, identities of each piece, whole runs, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from subspace_jax import linalg, metrics
from subspace_jax.cluster import s2cag
from tests.cluster.graphs import block_model, real_graph
from tests.conftest import GOLDEN

PUBLIC = (
    "GraphOperator S2CAG S2CAGResult choose_path m_s2cag modularity_embedding normalize_adjacency normalize_attributes "
    "randomized_left_svd s2cag smooth smooth_operator snem_round tfidf"
)
smooth = jax.jit(s2cag.smooth, static_argnames=("T", "alpha", "series"))
snem = jax.jit(s2cag.snem_round)
rounded = jax.jit(s2cag.round_embedding, static_argnames="rounding")
modular = jax.jit(s2cag.modularity_embedding, static_argnames="k")
matvec, rmatvec = jax.jit(lambda p, y: p.matvec(y)), jax.jit(lambda p, y: p.rmatvec(y))


@jax.jit
def polynomial(p, y):
    apply, apply_t = s2cag.smooth_operator(p, 4, 1.3)
    return apply(y), apply_t(y)


@functools.partial(jax.jit, static_argnames=("k", "drop_first"))
def left_svd(z, g, k, tau, drop_first=True):
    return s2cag.randomized_left_svd(z, k, tau, G=g, drop_first=drop_first)


@functools.partial(jax.jit, static_argnames=("k", "T"))
def implicit_svd(p, x, g, k, T, tau):
    apply, apply_t = s2cag.smooth_operator(p, T, 0.8)
    products = (lambda y: apply(linalg.times(x, y))), (lambda y: linalg.gram(x, apply_t(y)))
    return s2cag.randomized_left_svd(s2cag.Smoothed(*products, x.shape, x.dtype), k, tau, G=g)


@pytest.fixture(scope="module")
def pieces():
    with np.load(GOLDEN / "s2cag" / "pieces.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def operator(pieces):
    with jax.enable_x64(True):
        return s2cag.normalize_adjacency(pieces["adjacency"], dtype=jnp.float64)


def projector(y):
    return np.asarray(y) @ np.asarray(y).T


def test_every_public_name_of_the_specification_exists():
    assert set(PUBLIC.split()) <= set(s2cag.__all__)


def test_preprocessing_is_the_golden_one(pieces, operator, x64):
    f = s2cag.tfidf(jnp.asarray(pieces["counts"]))
    np.testing.assert_allclose(matvec(operator, jnp.eye(60)), pieces["P_hat"], atol=1e-10)
    np.testing.assert_allclose(rmatvec(operator, jnp.eye(60)), pieces["P_hat"].T, atol=1e-10)
    np.testing.assert_allclose(f, pieces["tfidf"], atol=1e-10)
    np.testing.assert_allclose(s2cag.normalize_attributes(f), pieces["X_hat"], atol=1e-10)


@pytest.mark.parametrize(
    ("name", "T", "alpha", "series"),
    [
        ("Z_T3_a0.8", 3, 0.8, "recursion"),
        ("Z_T6_a1.0", 6, 1.0, "recursion"),
        ("Z_T5_a1.7", 5, 1.7, "recursion"),
        ("Z", 5, 0.8, "recursion"),
        ("Z_series", 5, 0.8, "paper"),
    ],
)
def test_smoothed_attributes_are_the_golden_ones(name, T, alpha, series, pieces, operator, x64):
    assert pieces["Z_params"].tolist() == [5, 0.8]
    found = smooth(operator, jnp.asarray(pieces["X_hat"]), T=T, alpha=alpha, series=series)
    np.testing.assert_allclose(found, pieces[name], atol=1e-10)


def test_left_vectors_are_the_golden_ones_of_both_paths(pieces, operator, x64):
    z, g, x = (jnp.asarray(pieces[name]) for name in ("Z", "svd_G", "X_hat"))
    for name, tau in (("svd_U", 7), ("svd_U_tau2", 2)):
        found = left_svd(z, g, k=3, tau=tau)
        np.testing.assert_allclose(projector(found), projector(pieces[name]), atol=1e-8)
        np.testing.assert_allclose(found, pieces[name], atol=1e-6)
        np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
    found = implicit_svd(operator, x, g, k=3, T=5, tau=7)
    np.testing.assert_allclose(found, pieces["implicit_U"], atol=1e-6)


def test_modularity_embeddings_are_the_golden_ones(pieces, x64):
    z, q = jnp.asarray(pieces["Z"]), jnp.asarray(pieces["mod_Q0_raw"])
    weighted = np.sqrt(np.maximum(pieces["Z"].sum(1), 0))[:, None] * pieces["Z"]
    np.testing.assert_allclose(weighted, pieces["mod_adapt"], atol=1e-10)
    for name, gamma, tau in (("mod_Q_g1.0_t5", 1.0, 5), ("mod_Q_g0.9_t30", 0.9, 30)):
        found = modular(z, k=3, gamma=gamma, tau=tau, Q0=q)
        np.testing.assert_allclose(projector(found), projector(pieces[name]), atol=1e-8)


def test_snem_round_of_golden_embeddings_has_the_golden_labels(pieces, x64):
    for name in ("svd_U", "mod_Q_g0.9_t30"):
        np.testing.assert_array_equal(snem(jnp.asarray(pieces[name])), pieces[f"snem_{name}"])
    with np.load(GOLDEN / "s2cag" / "acm_reference.npz") as archive:
        for name in ("sub", "mod"):
            found = snem(jnp.asarray(archive[f"{name}_embedding"], jnp.float64))
            np.testing.assert_array_equal(found, archive[f"{name}_labels"])
            found = snem(jnp.asarray(archive[f"{name}_embedding"], jnp.float32))
            np.testing.assert_array_equal(found, archive[f"{name}_labels"])


@pytest.mark.slow
def test_smoothed_attributes_of_acm_are_those_of_the_authors_code(x64):
    from subspace_jax import data

    graph = data.read_graph(real_graph("acm"))
    with np.load(real_graph("acm")) as archive:
        labels = archive["labels"]
    with np.load(GOLDEN / "s2cag" / "acm_reference.npz") as archive:
        golden = dict(archive)
    operator = s2cag.normalize_adjacency(graph.adjacency, dtype=jnp.float64)
    x = s2cag.normalize_attributes(s2cag.tfidf(jnp.asarray(graph.attributes.toarray(), jnp.float64)))
    for name in ("sub", "mod"):
        T, alpha = int(golden[f"{name}_params"][0]), float(golden[f"{name}_params"][1])
        z = np.asarray(smooth(operator, x, T=T, alpha=alpha, series="recursion"))
        np.testing.assert_allclose(z[:8, :32], golden[f"{name}_Z_head"], rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(z.sum(0)[:64], golden[f"{name}_Z_colsum"], rtol=1e-8)
        np.testing.assert_allclose(np.linalg.norm(z), golden[f"{name}_Z_frob"], rtol=1e-8)
        scores = metrics.cluster_scores(labels, golden[f"{name}_labels"].astype(int))
        np.testing.assert_allclose(scores[:3], golden[f"{name}_acc_nmi_ari"], atol=1e-9)
    narrow = smooth(
        s2cag.normalize_adjacency(graph.adjacency), x.astype(jnp.float32), T=15, alpha=0.8, series="recursion"
    )
    np.testing.assert_allclose(np.linalg.norm(narrow), golden["sub_Z_frob"], rtol=1e-4)
    np.testing.assert_allclose(narrow[:8, :32], golden["sub_Z_head"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["double", "random_walk"])
def test_rows_of_the_operator_sum_to_one_and_the_transpose_is_the_transpose(kind):
    # Hubs have more entries than a row has slots; the last node has none.
    rng = np.random.default_rng(0)
    a = (rng.random((60, 60)) < 0.05).astype(float)
    a[:2, :59] = 1
    a[:, 59] = a[59] = 0
    a = np.maximum(a, a.T)
    p = s2cag.normalize_adjacency(a, kind)
    assert p.more_idx.shape[1] > 0
    dense = np.asarray(matvec(p, jnp.eye(60)))
    np.testing.assert_allclose(dense.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(rmatvec(p, jnp.eye(60)), dense.T, atol=1e-6)
    d1 = (a + np.eye(60)).sum(1)
    root = 1 / np.sqrt(d1)
    expected = (a + np.eye(60)) / d1[:, None]
    if kind == "double":
        expected = root[:, None] * (a + np.eye(60)) * root + np.eye(60)
        expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(dense, expected, atol=1e-6)


def test_smooth_is_the_dense_polynomial_and_leaves_attributes_for_no_step(pieces, operator, x64):
    x, p = jnp.asarray(pieces["X_hat"]), pieces["P_hat"]
    weights = 1.3 ** np.arange(5)
    weights /= weights.sum()
    dense = sum(w * np.linalg.matrix_power(p, t) for t, w in enumerate(weights))
    found, transposed = polynomial(operator, x)
    np.testing.assert_allclose(found, dense @ x, atol=1e-10)
    np.testing.assert_allclose(transposed, dense.T @ x, atol=1e-10)
    np.testing.assert_allclose(s2cag.smooth(operator, x, 0, 0.8), x)
    np.testing.assert_allclose(s2cag.smooth(operator, x, 4, 1e-12), x, atol=1e-10)


def test_smooth_of_many_growing_weights_is_finite_in_float32(pieces):
    p = s2cag.normalize_adjacency(pieces["adjacency"])
    x = jnp.asarray(pieces["X_hat"], jnp.float32)
    for series in ("paper", "recursion"):
        z = np.asarray(smooth(p, x, T=175, alpha=1.8, series=series))
        stationary = np.linalg.matrix_power(pieces["P_hat"], 175) @ pieces["X_hat"]
        np.testing.assert_allclose(z / np.linalg.norm(z), stationary / np.linalg.norm(stationary), atol=1e-4)


def test_attribute_similarities_have_the_largest_eigenvalue_one(pieces, x64):
    f = pieces["tfidf"].copy()
    f[3] = 0  # legal, and stays zero
    x = np.asarray(s2cag.normalize_attributes(jnp.asarray(f)))
    sums = (f @ f.T).sum(1)
    scale = 1 / np.sqrt(np.where(sums == 0, 1, sums))
    np.testing.assert_allclose(x @ x.T, scale[:, None] * (f @ f.T) * scale, atol=1e-12)
    values, vectors = np.linalg.eigh(x @ x.T)
    assert values[-1] == pytest.approx(1)
    np.testing.assert_allclose(np.abs(vectors[:, -1]), np.sqrt(sums) / np.linalg.norm(np.sqrt(sums)), atol=1e-8)
    assert not x[3].any()


def test_the_implicit_path_has_the_space_of_the_series(pieces, operator, x64):
    z = np.asarray(smooth(operator, jnp.asarray(pieces["X_hat"]), T=5, alpha=0.8))
    g, x = jnp.asarray(pieces["svd_G"]), jnp.asarray(pieces["X_hat"])
    exact = np.linalg.svd(z)[0][:, 1:4]
    for tau, bound in ((7, 1e-3), (60, 1e-8)):
        explicit, implicit = left_svd(jnp.asarray(z), g, k=3, tau=tau), implicit_svd(operator, x, g, k=3, T=5, tau=tau)
        assert np.linalg.norm(projector(explicit) - projector(implicit)) < bound
    assert np.linalg.norm(projector(implicit) - projector(exact)) < 1e-8


def test_the_projector_on_left_vectors_leaves_the_tail_energy(pieces, x64):
    z = pieces["Z"]
    y = np.asarray(left_svd(jnp.asarray(z), jnp.asarray(pieces["svd_G"]), k=3, tau=60, drop_first=False))
    tail = np.square(np.linalg.svd(z)[1][3:]).sum()
    assert np.square(z - projector(y) @ z).sum() == pytest.approx(tail, rel=1e-8)
    assert (np.take_along_axis(y, np.abs(y).argmax(0)[None], 0) > 0).all()


def test_modularity_without_resolution_has_the_leading_space_and_kills_the_constant_with_one(pieces, x64):
    weighted = pieces["mod_adapt"]
    z, q = jnp.asarray(pieces["Z"]), jnp.asarray(pieces["mod_Q0_raw"])
    found = modular(z, k=3, gamma=0.0, tau=300, Q0=q)
    assert np.linalg.norm(projector(found) - projector(np.linalg.svd(weighted)[0][:, :3])) < 1e-6
    omega = weighted @ weighted.sum(0)
    matrix = weighted @ weighted.T - np.outer(omega, omega) / omega.sum()
    np.testing.assert_allclose(matrix.sum(1), 0, atol=1e-12)
    traces = [np.trace(y.T @ matrix @ y) for y in (modular(z, k=3, gamma=1.0, tau=t, Q0=q) for t in (5, 10, 20, 40))]
    assert (np.diff(traces) > -1e-12).all()


def test_labels_of_snem_follow_a_permutation_of_the_columns(pieces):
    y = np.asarray(pieces["svd_U"], np.float32)
    order = np.asarray([2, 0, 1])
    np.testing.assert_array_equal(order[np.asarray(snem(jnp.asarray(y[:, order])))], snem(jnp.asarray(y)))
    init = snem(jnp.asarray(y))
    np.testing.assert_array_equal(s2cag.snem_round(jnp.asarray(y), init=init), init)


def test_pivoted_rounding_depends_on_no_sign_or_rotation_and_passes_over_rows_of_zeros():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    y = np.eye(3)[labels] + 0.1 * rng.standard_normal((60, 3))
    y[:4] = 0
    y = (y @ np.linalg.qr(rng.standard_normal((3, 3)))[0]).astype(np.float32)
    for seed in range(4):
        found = rounded(jax.random.key(seed), jnp.asarray(y), rounding="snem-cpqr")
        assert metrics.clustering_accuracy(labels[4:], np.asarray(found)[4:]) == 1


def test_s2cag_finds_planted_classes():
    a, counts, labels = block_model(0, 24, 3, 36)
    found = s2cag.s2cag(jax.random.key(1), a, sp.csr_array(counts), 3, T=4, rounding="snem")
    assert found.path == "explicit"
    assert metrics.clustering_accuracy(labels, found.labels) == 1


@pytest.mark.slow
def test_both_methods_and_paths_find_planted_classes():
    a, counts, labels = block_model(0, 24, 3, 36)
    p = s2cag.normalize_adjacency(a)
    for method in (s2cag.s2cag, s2cag.m_s2cag):
        found = [method(jax.random.key(1), p, counts, 3, T=4, path=path, tau=30) for path in ("explicit", "implicit")]
        assert [one.path for one in found] == ["explicit", "implicit"]
        for one in found:
            assert one.embedding.dtype == jnp.float32
            assert metrics.clustering_accuracy(labels, one.labels) == 1
        np.testing.assert_allclose(projector(found[0].embedding), projector(found[1].embedding), atol=1e-2)
    jitted = jax.jit(lambda key, p, x: s2cag.m_s2cag(key, p, x, 3, T=4, tau=30)[:2])(jax.random.key(1), p, counts)
    np.testing.assert_array_equal(jitted[1], found[0].labels)


@pytest.mark.slow
def test_the_estimator_clusters_karate_club_and_isolated_nodes():
    import networkx as nx

    graph = nx.karate_club_graph()
    found = s2cag.S2CAG(2, n_steps=3, random_state=0).fit(graph, np.eye(34))
    assert found.labels_.shape == (34,)
    assert metrics.graph_modularity(nx.to_scipy_sparse_array(graph), found.labels_) > 0.3
    graph.add_nodes_from([100, 101])  # without edges, and one of them without attributes
    again = s2cag.S2CAG(2, n_steps=3, resolution=1.0, random_state=0)
    labels = again.fit_predict(graph, np.pad(np.eye(35), ((0, 1), (0, 0))))
    np.testing.assert_array_equal(labels, again.labels_)
    assert np.isfinite(again.embedding_).all()
    parts = sp.block_diag([np.ones((6, 6)), np.ones((6, 6)), np.ones((6, 6))])
    counts = np.kron(np.eye(3), np.ones((6, 3)))
    labels = s2cag.S2CAG(3, n_steps=3, random_state=0).fit_predict(parts, counts)
    assert metrics.clustering_accuracy(np.repeat(np.arange(3), 6), labels) >= 2 / 3
    with pytest.raises(ValueError, match="gamma: expected 0 or more, got -1"):
        s2cag.S2CAG(2, resolution=-1).fit(graph, np.eye(36))


@pytest.mark.parametrize(
    ("method", "path", "rounding"),
    [
        ("s2cag", "implicit", "snem"),
        pytest.param("s2cag", "explicit", "snem-cpqr", marks=pytest.mark.slow),
        pytest.param("m_s2cag", "explicit", "snem-cpqr", marks=pytest.mark.slow),
        pytest.param("m_s2cag", "implicit", "kmeans", marks=pytest.mark.slow),
    ],
)
@pytest.mark.eight_devices
def test_nodes_sharded_over_eight_devices_give_the_clusters_of_one(method, path, rounding):
    from jax.sharding import AxisType

    # 75 nodes, which eight does not divide, and a hub.
    a, counts, labels = block_model(0, 25, 3, 36)
    a = a.toarray()
    a[0, 1:] = a[1:, 0] = 1
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    one, eight = s2cag.normalize_adjacency(a), s2cag.normalize_adjacency(a, mesh=mesh)
    assert (one.rows, eight.rows, eight.nodes) == (75, 80, 75)
    assert len(eight.idx.sharding.device_set) == 8
    run, options = getattr(s2cag, method), {"T": 4, "path": path, "rounding": rounding, "tau": 30}
    found = [run(jax.random.key(0), p, counts, 3, **options) for p in (one, eight)]
    np.testing.assert_allclose(projector(found[0].embedding), projector(found[1].embedding), atol=1e-4)
    np.testing.assert_array_equal(found[0].labels, found[1].labels)
    assert metrics.clustering_accuracy(labels, found[0].labels) > 0.95


def test_choose_path_takes_the_fewer_operations():
    assert s2cag.choose_path(3025, 1870, 29281, 3, 15, 7) == "implicit"
    assert s2cag.choose_path(10**6, 64, 2 * 10**7, 10, 10, 7) == "explicit"


A = np.asarray([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]], float)
X = np.random.default_rng(0).poisson(1.0, (4, 6)).astype(np.float32) + 1
KEY = jax.random.key(0)


def call(**changes):
    given = {"adj": A, "X": X, "k": 2} | changes
    return s2cag.s2cag(KEY, given.pop("adj"), given.pop("X"), given.pop("k"), **given)


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (lambda: call(X=X[:3]), r"X: expected attributes \[4, d\], one row of each node, got shape \(3, 6\)"),
        (lambda: call(k=4), "k: expected 1 to 3, one less than nodes and attributes, 4 and 6, got 4"),
        (lambda: call(X=X[:, :2]), "k: expected 1 to 1, one less than nodes and attributes, 4 and 2, got 2"),
        (lambda: s2cag.m_s2cag(KEY, A, X, 5), "k: expected 1 to 4, the number of nodes, got 5"),
        (lambda: call(adj=-A), r"adj: expected edge weights of 0 or more, finite, got -1\.0 of nodes 0 and 1"),
        (lambda: call(adj=A[:3]), r"adj: expected an adjacency \[n, n\], got shape \(3, 4\)"),
        (lambda: call(alpha=0.0), "alpha: expected more than 0, got 0.0"),
        (lambda: call(T=-1), "T: expected 0, 1, 2, ..., got -1"),
        (lambda: call(tau=-1), "tau: expected 0 or more, got -1"),
        (lambda: call(gamma=-1.0), "gamma: expected 0 or more"),
        (lambda: call(rounding="argmax"), "rounding: expected one of snem-cpqr, snem, kmeans, got 'argmax'"),
        (lambda: call(series="taylor"), "series: expected one of paper, recursion, got 'taylor'"),
        (lambda: call(path="both"), "path: expected one of None, explicit, implicit, got 'both'"),
        (lambda: call(path="implicit", series="recursion"), "series: expected 'paper' for the implicit path"),
        (lambda: call(X=np.zeros((4, 6))), "X: expected attributes that are not all zero"),
        (lambda: call(X=np.where(X > 2, np.nan, X)), "counts: expected finite numbers, got NaN"),
        (lambda: call(X=-X), "counts: expected no negative entry"),
        (lambda: call(X=np.asarray([[1, 0], [0, 0], [-2, 0], [0, 1.0]]), k=1, counts=False), "add up to no less than"),
        (lambda: s2cag.normalize_adjacency(A, "laplacian"), "kind: expected one of double, random_walk"),
        (lambda: s2cag.tfidf(X[0]), r"counts: expected attributes \[n, d\], got shape \(6,\)"),
        (lambda: s2cag.smooth(s2cag.normalize_adjacency(A), X[:3], 2, 0.5), r"x: expected attributes \[4, d\]"),
        (lambda: s2cag.smooth_operator(None, 2, -0.5), "alpha: expected more than 0"),
        (lambda: s2cag.smooth_operator(None, -2, 0.5), "T: expected 0 or more"),
        (lambda: s2cag.randomized_left_svd(jnp.asarray(X), 4, 7), "k: expected 1 to 3 vectors and the first one"),
        (lambda: s2cag.randomized_left_svd(jnp.asarray(X), 2, -1), "tau, oversample: expected 0 or more"),
        (lambda: s2cag.randomized_left_svd(jnp.asarray(X), 2, 1, G=X), r"G: expected \[6, 3 to 4\], got \(4, 6\)"),
        (lambda: s2cag.modularity_embedding(jnp.asarray(X), 5, 1.0, 3), "k: expected 1 to 4, the number of nodes"),
        (lambda: s2cag.modularity_embedding(jnp.asarray(X), 2, -1.0, 3), "gamma, tau: expected 0 or more"),
        (lambda: s2cag.modularity_embedding(jnp.asarray(X), 2, 1.0, 3, Q0=X), r"Q0: expected \[4, 2\], got \(4, 6\)"),
        (lambda: s2cag.modularity_embedding(jnp.zeros((4, 6)), 2, 1.0, 3), "Z: expected smoothed attributes that are"),
        (lambda: s2cag.snem_round(jnp.ones(4)), r"Y: expected an embedding \[n, k\], got shape \(4,\)"),
        (lambda: s2cag.snem_round(jnp.asarray(X), -1), "n_iter: expected 0 or more"),
        (lambda: s2cag.snem_round(jnp.asarray(X), init=jnp.ones(3)), r"init: expected labels \[4\], got shape \(3,\)"),
        (lambda: s2cag.round_embedding(KEY, jnp.asarray(X)), r"Y: expected an embedding \[n, k\] with k <= n"),
    ],
)  # fmt: skip
def test_s2cag_refuses_what_can_not_serve(run, error):
    with pytest.raises(ValueError, match=error):
        run()


def test_s2cag_refuses_integers_where_numbers_are_and_unknown_options():
    with pytest.raises(TypeError, match="counts: expected floating point, got int32"):
        s2cag.tfidf(np.ones((3, 2), np.int32))
    with pytest.raises(TypeError, match="steps"):
        call(steps=3)
