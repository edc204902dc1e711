"""Alignment of paired feature spaces: golden vectors, invariances, bounds, and what is refused."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics
from subspace_jax.interpret import platos_cave_3d as platos
from subspace_jax.interpret.platos_cave_3d import core, data, evaluate

SURFACE = {
    "CCASubspace", "fit_cca_subspace", "project_x", "project_y", "AffineMap", "fit_affine", "apply_affine",
    "cosine_scores", "local_cka_scores", "relative_representation", "match_accuracy", "retrieval_at_k",
    "select_anchors", "align", "AlignmentReport", "pearson",
}  # fmt: skip
MEASURES = {"mutual_knn", "cycle_knn", "lcs_knn", "cka", "unbiased_cka", "cknna", "chamfer_distance"}

SUBSPACE = jax.jit(platos.fit_cca_subspace, static_argnames=("k", "reg", "eps"))
AFFINE = jax.jit(platos.fit_affine, static_argnames=("ridge", "bias", "orthogonal"))
LOCAL_CKA = jax.jit(platos.local_cka_scores, static_argnames=("kernel", "chunk"))
METHODS = evaluate.METHODS
MATCHING = evaluate._match_accuracy  # compiled for `align` too
MOMENTS = jax.jit(linalg.pair_moments)
MERGED = jax.jit(linalg.merge_pair_moments)
PLANTED = jax.jit(data.planted_pairs, static_argnums=1)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def golden_file():
    folder = pathlib.Path(__file__).parents[1] / "golden" / "platos-cave-3d"
    with np.load(folder / "subspace_alignment.npz") as archive:
        return dict(archive)


@functools.cache
def planted(seed=0):
    """Anchors and queries of both sides: 150 and 24 pairs, widths 20 and 14, 4 shared directions."""
    x, y = PLANTED(jax.random.key(seed), 174)
    return x[:150], y[:150], x[150:], y[150:]


def test_every_name_of_the_public_surface_is_there():
    assert set(platos.__all__) >= SURFACE
    assert set(metrics.__all__) >= MEASURES
    assert all(hasattr(platos, name) for name in platos.__all__)


def test_subspace_maps_and_scores_are_those_of_the_reference(golden_file, x64):
    file = {name: jnp.asarray(value) for name, value in golden_file.items()}
    xa, ya, xq, yq = (file[name] for name in ("X_anchor", "Y_anchor", "X_query", "Y_query"))
    found, scores, (ax, ay, px, py) = in_file(xa, ya, xq, yq)
    scores |= {
        "local_cka_linear_sub": LOCAL_CKA(ay, ax, py, px),
        "local_cka_rbf_sub": LOCAL_CKA(ay, ax, py, px, kernel="rbf", chunk=64),
    }
    for name, value in found.items():
        chex.assert_trees_all_close(value, file[name], atol=1e-6)
    matching, hits = matching_and_retrieval(jnp.stack(list(scores.values())))
    for i, (name, value) in enumerate(scores.items()):
        expected = file[name if name in file else f"sim_{name}"]
        chex.assert_trees_all_close(value, expected, atol=1e-3 if "rbf" in name else 1e-6)
        chex.assert_trees_all_close(matching[i], file[f"matching_{name}"], atol=1e-12)
        chex.assert_trees_all_close(hits[i], file[f"retrieval_top1_5_10_{name}"], atol=1e-12)


@jax.jit
def in_file(xa, ya, xq, yq):
    """What the file has of a subspace, but local CKA in it, whose programs other tests use too."""
    sub = platos.fit_cca_subspace(xa, ya, k=4, reg=0.0, eps=1e-8)
    whole = platos.fit_affine(ya, xa)
    projected = ax, ay, px, py = (*map(project, (sub,) * 4, "xyxy", (xa, ya, xq, yq)),)
    relative = (platos.relative_representation(z, a) for z, a in ((yq, ya), (xq, xa)))
    found = {
        "mean_x": sub.mean_x,
        "mean_y": sub.mean_y,
        "rho": sub.rho,
        "proj_x": sub.wx @ sub.wx.T,
        "proj_y": sub.wy @ sub.wy.T,
        "cross_proj": sub.wx @ sub.wy.T,
        "affine_full_R": whole.R,
        "affine_full_b": whole.b,
    }
    scores = {
        "affine_sub": platos.cosine_scores(platos.apply_affine(platos.fit_affine(ay, ax), py), px),
        "affine_full": platos.cosine_scores(platos.apply_affine(whole, yq), xq),
        "local_cka_linear_full": platos.local_cka_scores(ya, xa, yq, xq),
        "relative_full": platos.cosine_scores(*relative),
    }
    return found, scores, projected


@jax.jit
def matching_and_retrieval(scores):
    matching = jax.vmap(lambda own: platos.match_accuracy(own, KEY))(scores)
    return matching, jax.vmap(lambda own: platos.retrieval_at_k(own, (1, 5, 10)))(scores)


def project(sub, side, z):
    return (platos.project_x if side == "x" else platos.project_y)(sub, z)


def test_median_sigma_takes_the_lower_of_two_and_no_zero():
    sigma = jax.jit(metrics.median_sigma)
    # Squares 1, 1, 9, 9, 16 and a zero that does not count.
    assert sigma(jnp.asarray([[0.0], [1.0], [1.0], [4.0]])) == 3
    # Squares 4, 25, 49, 64, 100, 225: the third of an even number, not its mean with the fourth.
    assert sigma(jnp.asarray([[0.0], [5.0], [7.0], [15.0]])) == 7
    assert np.isnan(sigma(jnp.ones((4, 1))))
    with pytest.raises(ValueError, match=r"x: expected two examples"):
        metrics.median_sigma(jnp.ones((1, 2)))


def test_projected_anchors_are_white_and_correlated_by_rho_alone(golden_file, x64):
    xa, ya = (jnp.asarray(golden_file[name]) for name in ("X_anchor", "Y_anchor"))
    sub = SUBSPACE(xa, ya, k=14, reg=0.0)
    both = np.cov(np.asarray(platos.project_x(sub, xa)).T, np.asarray(platos.project_y(sub, ya)).T)
    expected = np.block([[np.eye(14), np.diag(sub.rho)], [np.diag(sub.rho), np.eye(14)]])
    chex.assert_trees_all_close(both, expected, atol=1e-6)
    assert np.all(np.diff(sub.rho) <= 0)
    assert 0 <= sub.rho[-1] <= sub.rho[0] <= 1
    qx, qy = (np.linalg.qr(golden_file[n] - golden_file[n].mean(0))[0] for n in ("X_anchor", "Y_anchor"))
    chex.assert_trees_all_close(sub.rho, np.linalg.svd(qx.T @ qy, compute_uv=False), atol=1e-8)
    leading = sub.leading(4)
    chex.assert_trees_all_close(leading, SUBSPACE(xa, ya, k=4, reg=0.0), atol=1e-8)


def test_scores_do_not_depend_on_an_invertible_map_of_either_space_and_permute_with_the_queries(golden_file, x64):
    xa, ya, xq, yq = (jnp.asarray(golden_file[n]) for n in ("X_anchor", "Y_anchor", "X_query", "Y_query"))
    rng = np.random.default_rng(0)
    bend, other = (jnp.asarray(rng.standard_normal((n, n)) + 3 * np.eye(n)) for n in (20, 14))
    order = jnp.asarray(rng.permutation(24))

    @functools.partial(jax.jit, static_argnames="method")
    def scores(xa, ya, xq, yq, method):
        moments = linalg.pair_moments(xa, ya)
        sub = platos.subspace_of_moments(moments, 4, 0.0)
        queries = platos.project_x(sub, xq), platos.project_y(sub, yq)
        return evaluate.scores_by(method, core.project_moments(moments, sub), *queries, None)

    for method in ("affine", "local-cka"):
        plain = scores(xa, ya, xq, yq, method)
        bent = scores(xa @ bend + 5.0, ya @ other - 1.0, (xq @ bend + 5.0)[order], yq @ other - 1.0, method)
        chex.assert_trees_all_close(bent, plain[:, order], atol=1e-6)


def test_local_cka_is_the_cka_of_the_anchors_and_one_more_pair(golden_file, x64):
    xa, ya, xq, yq = (jnp.asarray(golden_file[n][:, :4]) for n in ("X_anchor", "Y_anchor", "X_query", "Y_query"))
    found, by_rbf = LOCAL_CKA(xa, ya, xq, yq), LOCAL_CKA(xa, ya, xq, yq, kernel="rbf", chunk=64)
    sigmas = [float(np.sqrt(lower_median(a))) for a in (xa, ya)]
    for i in (0, 7, 23):
        for j in (1, 7):
            x, y = np.vstack([xa, xq[i]]), np.vstack([ya, yq[j]])
            assert found[i, j] == pytest.approx(plain_cka(x @ x.T, y @ y.T), abs=1e-9)
            kernels = [gaussian(z, sigma) for z, sigma in zip((x, y), sigmas, strict=True)]
            assert by_rbf[i, j] == pytest.approx(plain_cka(*kernels), abs=1e-9)
    assert LOCAL_CKA(xa, 2 * xa, xq, 2 * xq)[1, 1] == pytest.approx(1, abs=1e-12)


def plain_cka(k, l):
    h = np.eye(len(k)) - 1 / len(k)
    hsic = [np.trace(a @ h @ b @ h) for a, b in ((k, l), (k, k), (l, l))]
    return hsic[0] / np.sqrt(hsic[1] * hsic[2])


def gaussian(z, sigma):
    return np.exp(-np.sum((z[:, None] - z[None]) ** 2, -1) / (2 * sigma**2))


def lower_median(z):
    z = np.asarray(z)
    squares = np.sort(np.sum((z[:, None] - z[None]) ** 2, -1)[np.triu_indices(len(z), 1)])
    return squares[(len(squares) - 1) // 2]


def test_spaces_that_are_maps_of_each_other_match_perfectly(golden_file, x64):
    xa, xq = (jnp.asarray(golden_file[name]) for name in ("X_anchor", "X_query"))
    bend = jnp.asarray(np.random.default_rng(0).standard_normal((14, 14)) + 3 * np.eye(14))
    sub = SUBSPACE(xa, xa[:, :14] @ bend, k=14, reg=0.0)
    chex.assert_trees_all_close(sub.rho, np.ones(14), atol=1e-9)
    scores = platos.cosine_scores(project(sub, "y", xq[:, :14] @ bend), project(sub, "x", xq))
    assert MATCHING(scores, KEY) == platos.retrieval_at_k(scores, (1, 5, 10))[0] == 1


# The command's tests have the others among the quick ones.
@pytest.mark.parametrize("method", ["affine", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_the_subspace_finds_pairs_that_the_features_hide(method):
    report = platos.align(*planted(), 4, method)
    assert report.matching == 1
    assert report.full_matching <= 0.75
    assert np.all(report.held_out_rho > 0.9)
    assert report.chance_matching == 1 / 24
    assert report.chance_retrieval == (1 / 24, 5 / 24, 10 / 24)
    assert report.translation.R.shape == (4, 4)


def test_align_reports_that_correlations_of_anchors_do_not_hold_where_there_are_few():
    x, y = (jax.random.normal(key, (174, n)) for key, n in zip(jax.random.split(KEY), (20, 14), strict=True))
    report = platos.align(x[:150], y[:150], x[150:], y[150:], 4)
    assert report.subspace.rho[0] > 0.35
    assert abs(np.mean(report.held_out_rho)) < 0.3


def test_random_scores_match_and_retrieve_by_chance_and_ties_are_stable():
    scores = jax.random.normal(KEY, (24, 24))
    rolled = np.stack([np.roll(scores, i, 1) for i in range(24)])
    hits = jax.jit(jax.vmap(lambda scores: platos.retrieval_at_k(scores, (1, 5, 10))))(rolled)
    # Each item is rolled through all ranks once.
    chex.assert_trees_all_close(np.mean(hits, axis=0), np.asarray([1, 5, 10], np.float32) / 24, atol=1e-6)
    matched = [MATCHING(each, KEY) for each in rolled]
    assert np.mean(matched) == pytest.approx(1 / 24, abs=1e-6)
    assert MATCHING(10 * jnp.eye(24) + scores, KEY) == 1
    ties = jnp.zeros((24, 24))
    assert platos.retrieval_at_k(ties, (1, 5)).tolist() == pytest.approx([1 / 24, 5 / 24])
    # An assignment of equal scores is no better than chance, whatever their order.
    equal = [float(MATCHING(ties, key)) for key in jax.random.split(KEY, 20)]
    assert np.mean(equal) < 0.12


def test_moments_of_blocks_are_those_of_all_pairs_also_far_from_the_origin():
    x, y = (z + 300.0 for z in planted()[:2])
    weights = jnp.ones(150).at[-6:].set(0)
    parts = [MOMENTS(x[i : i + 50], y[i : i + 50], weights[i : i + 50]) for i in (0, 50, 100)]
    empty = MOMENTS(x[:50], y[:50], jnp.zeros(50))
    found = functools.reduce(MERGED, [empty, *parts, empty])
    wide = [np.asarray(z[:144], np.float64) for z in (x, y)]
    both = np.cov(wide[0].T, wide[1].T) * 143
    expected = linalg.PairMoments(144, *(z.mean(0) for z in wide), both[:20, :20], both[:20, 20:], both[20:, 20:])
    # Sums of 144 squares of about 5, of entries that are rounded to 3e-5.
    for value, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=0.03)


@pytest.mark.eight_devices
def test_a_subspace_of_sharded_anchors_is_that_of_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    xa, ya, xq, yq = planted()
    fit = jax.jit(lambda x, y: platos.subspace_of_moments(linalg.pair_moments(x, y), 4, 1e-6))
    scores = jax.jit(lambda q, xa, ya, yq: platos.local_cka_scores(xa, ya, q, yq))
    single = fit(xa[:144], ya[:144])
    sharded = fit(*(jax.device_put(z[:144], rows) for z in (xa, ya)))
    chex.assert_trees_all_close(sharded.rho, single.rho, atol=1e-5)
    chex.assert_trees_all_close(sharded.wx @ sharded.wy.T, single.wx @ single.wy.T, atol=1e-4)
    found = scores(jax.device_put(xq, rows), xa, ya, yq)
    assert len(found.sharding.device_set) == 8
    chex.assert_trees_all_close(found, scores(xq, xa, ya, yq), atol=1e-5)


def test_fit_affine_by_least_squares_ridge_without_bias_and_orthogonal(x64):
    rng = np.random.default_rng(0)
    src, tgt = rng.standard_normal((40, 5)) + 1, rng.standard_normal((40, 3)) - 2
    given = jnp.asarray(src), jnp.asarray(tgt)
    plain = np.linalg.lstsq(np.hstack([src, np.ones((40, 1))]), tgt)[0]
    chex.assert_trees_all_close(AFFINE(*given), platos.AffineMap(plain[:-1].T, plain[-1]), atol=1e-9)
    through = np.linalg.lstsq(src, tgt)[0].T
    chex.assert_trees_all_close(AFFINE(*given, bias=False), platos.AffineMap(through, np.zeros(3)), atol=1e-9)
    centred, means = src - src.mean(0), (src.mean(0), tgt.mean(0))
    kernel = np.linalg.solve(centred.T @ centred / 40 + 0.7 * np.eye(5), centred.T @ (tgt - means[1]) / 40).T
    expected = platos.AffineMap(kernel, means[1] - kernel @ means[0])
    chex.assert_trees_all_close(AFFINE(*given, ridge=0.7), expected, atol=1e-9)
    rotation = AFFINE(*given, orthogonal=True)
    chex.assert_trees_all_close(
        rotation.R, linalg.orthogonal_procrustes(*map(jnp.asarray, (centred, tgt - means[1]))).T
    )
    chex.assert_trees_all_close(rotation.R @ rotation.R.T, np.eye(3), atol=1e-9)
    mapped = platos.apply_affine(rotation, given[0])
    chex.assert_trees_all_close(mapped, src @ np.asarray(rotation.R).T + np.asarray(rotation.b), atol=1e-9)
    # Features that depend on each other: the least of all maps.
    doubled = AFFINE(jnp.concatenate([given[0], given[0]], axis=1), given[1])
    chex.assert_trees_all_close(doubled.R[:, :5], plain[:-1].T / 2, atol=1e-6)


def test_select_anchors_draws_different_items_and_those_nearest_to_centres():
    centres = 10 * jnp.eye(6, 8)
    z = jnp.repeat(centres, 5, axis=0) + 0.1 * jax.random.normal(KEY, (30, 8))
    random = platos.select_anchors(KEY, z, 30)
    assert sorted(random.tolist()) == list(range(30))
    found = np.asarray(jax.jit(lambda key, z: platos.select_anchors(key, z, 6, "kmeans"))(jax.random.key(1), z))
    assert len(set(found)) == 6
    clusters = np.asarray(z).reshape(6, 5, 8)
    means = clusters.mean(1, keepdims=True)
    cosines = np.sum(clusters * means, -1) / np.linalg.norm(clusters, axis=-1) / np.linalg.norm(means, axis=-1)
    assert set(found) == set(cosines.argmax(1) + 5 * np.arange(6))


def test_stretched_features_have_deviation_1_together():
    za, zq = platos.stretched(*(jnp.pad(3 * z, ((0, 0), (0, 1))) for z in (planted()[0], planted()[2])))
    deviation = np.std(np.concatenate([za, zq]), axis=0, ddof=1)
    chex.assert_trees_all_close(deviation, np.asarray([1.0] * 20 + [0.0], np.float32), atol=1e-5)


def test_pearson_is_the_correlation_of_all_entries():
    a, b = jax.random.normal(KEY, (2, 6, 4)) + 100.0
    assert platos.pearson(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-4)
    assert platos.pearson(a, -a) == pytest.approx(-1)
    with pytest.raises(ValueError, match="a, b: expected two entries or more of one shape"):
        platos.pearson(a, b[:1])


@pytest.mark.slow
def test_point_clouds_lie_on_their_shapes_and_words_tell_them():
    clouds, words, kinds = data.point_clouds(KEY, 20, points=64)
    assert clouds.shape == (20, 64, 3)
    assert words.shape == (20, 32)
    sphere = clouds[np.flatnonzero(kinds == 0)[0]]
    size = np.max(np.abs(sphere), axis=0)
    # Points of an ellipsoid, whose semi-axes the outermost points nearly reach.
    assert np.all(np.sum((np.asarray(sphere) / size) ** 2, axis=1) < 1.4)
    box = np.asarray(clouds[np.flatnonzero(kinds == 1)[0]])
    assert np.mean(np.any(np.isclose(np.abs(box), np.max(np.abs(box), axis=0), atol=1e-5), axis=1)) == 1


@pytest.mark.parametrize(
    ("error", "change"),
    [
        ("k: expected 1 to the smaller of the widths 20 and 14, got 15", {"k": 15}),
        ("xa, ya: expected more anchors than the 4 directions, got 4", {"rows": 4}),
        (r"xa, ya: expected the same anchors .* \(149, 20\) and \(150, 14\)", {"xa": 149}),
        ("ya: expected finite features, got NaN or infinity", {"ya": np.nan}),
        ("reg: expected more than 0 for 20 anchors of widths 20 and 14", {"rows": 20, "reg": 0.0}),
        ("xa: feature 3 is constant over the anchors", {"constant": 3, "reg": 0.0}),
        ("reg, eps: expected 0 or more, got -1.0 and 0.0", {"reg": -1.0}),
    ],
)
def test_fit_cca_subspace_refuses_what_has_no_subspace(error, change):
    xa, ya = (z[: change.get("rows")] for z in planted()[:2])
    xa = xa[: change.get("xa")]
    xa = xa.at[:, change["constant"]].set(7.0) if "constant" in change else xa
    ya = ya.at[2, 5].set(jnp.nan) if "ya" in change else ya
    with pytest.raises(ValueError, match=error):
        platos.fit_cca_subspace(xa, ya, change.get("k", 4), change.get("reg", 1e-8))


def test_a_constant_feature_is_no_error_with_a_ridge():
    xa, ya, *_ = planted()
    sub = SUBSPACE(jnp.pad(xa[:, :19], ((0, 0), (0, 1))), ya, k=4, reg=1e-3)
    assert np.all(np.isfinite(sub.wx))


def test_alignment_refuses_other_queries_unknown_choices_and_shapes():
    xa, ya, xq, yq = planted()
    cases = [
        ("reg: expected more than 0 for 20 anchors", lambda: platos.align(xa[:20], ya[:20], xq, yq, 4, reg=0.0)),
        ("xq, yq: expected the same items, got 24 and 23", lambda: platos.align(xa, ya, xq, yq[1:], 4)),
        (
            "method: expected one of affine, local-cka, relative, got 'cca'",
            lambda: platos.align(xa, ya, xq, yq, 4, "cca"),
        ),
        (r"xq: expected queries of the width of the anchors, 20", lambda: platos.align(xa, ya, yq, yq, 4)),
        (
            "kernel: expected one of linear, rbf, got 'cosine'",
            lambda: platos.local_cka_scores(xa, ya, xq, yq, "cosine"),
        ),
        ("yq: expected finite features", lambda: platos.local_cka_scores(xa, ya, xq, yq.at[0].set(jnp.inf))),
        (r"scores: expected \[items, items\], got \(24, 20\)", lambda: platos.match_accuracy(xq, KEY)),
        ("scores: expected finite numbers", lambda: platos.retrieval_at_k(jnp.full((3, 3), jnp.nan), (1,))),
        (r"ks: expected numbers from 1, got \(0,\)", lambda: platos.retrieval_at_k(jnp.eye(3), (0,))),
        (r"a, b: expected vectors of one width", lambda: platos.relative_representation(xq, ya)),
        (r"src, tgt: expected the same anchors", lambda: platos.fit_affine(xa, yq)),
        ("ridge: expected 0 or more, and 0 for an orthogonal", lambda: platos.fit_affine(xa, ya, 1.0, orthogonal=True)),
        ("n: expected 1 to 150 of items", lambda: platos.select_anchors(KEY, xa, 151)),
        ("method: expected one of random, kmeans, got 'grid'", lambda: platos.select_anchors(KEY, xa, 5, "grid")),
        ("za, zq: expected features of one width", lambda: platos.stretched(xa, yq)),
        ("mask: expected", lambda: linalg.pair_moments(xa, ya, jnp.ones(3))),
        ("x, y: expected pairs", lambda: linalg.pair_moments(xa, yq)),
        ("k: expected 1 to 14", lambda: platos.subspace_of_moments(linalg.pair_moments(xa, ya), 0, 0.0)),
        ("widths: expected more than the 4 shared", lambda: data.planted_pairs(KEY, 9, 4, (4, 9))),
    ]
    for error, call in cases:
        with pytest.raises(ValueError, match=error):
            call()
