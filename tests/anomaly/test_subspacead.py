"""The subspace of normal variation: golden vectors, streams, scores, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import train
from subspace_jax.anomaly import subspacead
from subspace_jax.anomaly.subspacead.core import padded_columns

residual_score = jax.jit(subspacead.residual_score, static_argnames=("method", "drop_leading"))
update_moments = jax.jit(subspacead.update_moments)
OPTIONS = {"ev": {}, "kfix": {"rank": 5}, "full": {"rank": 24}}


def check_scores(subspace, data, tag, single):
    queries = jnp.asarray(data["queries"], jnp.float32 if single else jnp.float64)
    subspace = subspace._replace(components=padded_columns(subspace.components))  # one compilation for all ranks
    for method in subspacead.METHODS:
        for drop in (0, 2):
            found = residual_score(subspace, queries, method=method, drop_leading=drop)
            wanted = data[f"{tag}_{method}_drop{drop}{'' if single else '_f64'}"]
            noise = tag == "full" and drop == 0 and method in ("reconstruction", "cosine")
            if single:
                rtol, atol = (0, 1e-6) if method == "cosine" else (0, 1e-9) if noise else (2e-4, 0)
            else:
                rtol, atol = (0, 1e-14 if method == "cosine" else 1e-20) if noise else (1e-9, 0)
            assert found.dtype == queries.dtype
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol, err_msg=f"{tag} {method} {drop}")


@pytest.mark.parametrize("tag", OPTIONS)
def test_fit_pca_and_residual_score_give_the_golden_values(tag, golden, x64):
    data = golden("subspacead/pca_scores")
    features = data["features"].astype(np.float64)
    subspace = subspacead.fit_pca(features, **OPTIONS[tag])
    rank = int(data[f"{tag}_k"])
    assert int(subspace.rank) == rank == subspace.components.shape[1]
    np.testing.assert_allclose(subspace.mean, data[f"{tag}_mu"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(subspace.eigenvalues[:rank], data[f"{tag}_eigvals"], rtol=1e-9)
    np.testing.assert_allclose(subspace.components @ subspace.components.T, data[f"{tag}_projector"], atol=1e-9)
    check_scores(subspace, data, tag, single=False)
    check_scores(subspacead.fit_pca(data["features"], **OPTIONS[tag]), data, tag, single=True)


def test_subspace_from_moments_has_static_shapes_and_the_same_scores(golden, x64):
    data = golden("subspacead/pca_scores")
    solve = jax.jit(subspacead.subspace_from_moments, static_argnames=("explained_variance", "rank"))
    moments = update_moments(subspacead.init_moments(24, jnp.float64), jnp.asarray(data["features"]))
    subspace = solve(moments)
    assert subspace.components.shape == (24, 24)
    assert int(subspace.rank) == int(data["ev_k"])
    check_scores(subspace, data, "ev", single=False)
    fixed = solve(moments, rank=5)
    assert int(fixed.rank) == 5
    # With a share of the variance between two sums the rank is the smallest that has it.
    values = np.asarray(subspace.eigenvalues)
    shares = np.cumsum(values) / values.sum()
    for r in (1, 3, 7):
        share = float((shares[r - 2] if r > 1 else 0) + shares[r - 1]) / 2
        assert int(solve(moments, explained_variance=share).rank) == r
        assert int(subspacead.fit_pca(data["features"].astype(float), explained_variance=share).rank) == r


def test_the_kernel_variant_gives_the_golden_scores(golden, x64):
    data = golden("subspacead/pca_scores")
    fitted = data["features"][: int(data["kpca_n_fit"])].astype(np.float64)
    subspace = subspacead.fit_kernel_pca(fitted, int(data["kpca_k"]), gamma=float(data["kpca_gamma"]))
    found = jax.jit(subspacead.kernel_residual_score)(subspace, jnp.asarray(data["queries"], jnp.float64))
    np.testing.assert_allclose(found, data["kpca_scores"], atol=1e-8)
    assert subspacead.fit_kernel_pca(fitted, 3).gamma == 1 / 24


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((64, 6)) * np.array([3, 2, 1, 0.5, 0.2, 0.1]) + 5).astype(np.float64)


def test_scores_split_the_squared_distance_to_the_mean(rows, x64):
    subspace = subspacead.fit_pca(rows, rank=3)
    x = jnp.asarray(rows[:20] + 1)
    y = np.asarray(x - subspace.mean[None])
    off = y - y @ np.asarray(subspace.components @ subspace.components.T)
    s = residual_score(subspace, x)
    np.testing.assert_allclose(s, np.sum(off**2, 1), rtol=1e-10)
    np.testing.assert_allclose(s + residual_score(subspace, x, method="euclidean"), np.sum(y**2, 1), rtol=1e-10)
    # Any basis of the same subspace, and any rotation of the features, gives the same.
    rng = np.random.default_rng(1)
    small, large = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (3, 6))
    turned = subspace._replace(components=subspace.components @ small)
    np.testing.assert_allclose(residual_score(turned, x), s, rtol=1e-10)
    rotated = residual_score(subspacead.fit_pca(rows @ large, rank=3), x @ large)
    np.testing.assert_allclose(rotated, s, rtol=1e-9)
    # Nothing kept, everything kept, and Mahalanobis with all directions.
    nothing = subspacead.fit_pca(rows, rank=0)
    np.testing.assert_allclose(residual_score(nothing, x), np.sum(y**2, 1), rtol=1e-12)
    whole = subspacead.fit_pca(rows, rank=6)
    assert np.all(np.asarray(residual_score(whole, x)) < 1e-10 * np.sum(y**2, 1))
    usual = np.einsum("ni,ij,nj->n", y, np.linalg.inv(np.cov(rows.T)), y)
    np.testing.assert_allclose(residual_score(whole, x, method="mahalanobis"), usual, rtol=1e-3)
    dropped = residual_score(subspace, x, method="euclidean", drop_leading=3)
    np.testing.assert_array_equal(dropped, np.zeros(20))


def test_eigenvalues_are_those_of_the_svd_of_centred_rows(rows, x64):
    found = subspacead.fit_pca(rows).eigenvalues
    wanted = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2 / (len(rows) - 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_moments_of_a_stream_are_those_of_all_rows(rows, x64):
    mean, m2 = rows.mean(0), (rows - rows.mean(0)).T @ (rows - rows.mean(0))
    empty = subspacead.init_moments(6, jnp.float64)
    padded = np.vstack([rows[:24], np.full((8, 6), np.nan)])
    stream = update_moments(empty, jnp.asarray(padded), jnp.asarray([1.0] * 24 + [0.0] * 8))
    other = update_moments(empty, jnp.asarray(np.roll(padded, 8, 0)), jnp.asarray([0.0] * 8 + [1.0] * 24))
    chex.assert_trees_all_close(stream, other, rtol=1e-12)
    rest = update_moments(empty, jnp.asarray(rows[24:56]), jnp.ones(32))
    last = update_moments(empty, jnp.asarray(np.pad(rows[56:], ((0, 24), (0, 0)))), jnp.asarray([1.0] * 8 + [0.0] * 24))
    found = functools.reduce(subspacead.merge_moments, (empty, stream, rest, last))
    assert float(found.count) == 64
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.m2, m2, rtol=1e-12, atol=1e-11)
    twice = subspacead.fit_pca(np.vstack([rows, rows[:4]]), rank=2)
    weighted = subspacead.fit_pca(rows, rank=2, weights=np.r_[[2.0] * 4, np.ones(60)])
    chex.assert_trees_all_close(weighted, twice, rtol=1e-9)


def test_moments_in_float32_survive_means_far_from_zero(rows):
    far = (rows * 1e-2 + 100).astype(np.float32)
    found = update_moments(subspacead.init_moments(6), jnp.asarray(far[:32]))
    found = update_moments(found, jnp.asarray(far[32:]))
    wanted = np.cov(far.astype(np.float64).T) * 63
    np.testing.assert_allclose(found.m2, wanted, atol=2e-3 * np.abs(wanted).max())


def test_bfloat16_features_are_scored_in_float32(rows):
    x = jnp.asarray(rows, jnp.bfloat16)
    subspace = subspacead.fit_pca(x, rank=2)
    assert subspace.components.dtype == jnp.float32
    exact = residual_score(subspace, x.astype(jnp.float32))
    found = residual_score(subspace, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_tail_mean_takes_at_least_one_score():
    x = jnp.arange(400.0)
    assert float(subspacead.tail_mean(x)) == pytest.approx(397.5)
    assert float(subspacead.tail_mean(x[:50])) == 49


@pytest.mark.eight_devices
def test_moments_and_scores_on_eight_devices_equal_those_of_one(rows):
    mesh = train.make_mesh()
    x = rows.astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    moments = update_moments(subspacead.init_moments(6), jnp.asarray(x))
    found = update_moments(jax.device_put(subspacead.init_moments(6), NamedSharding(mesh, P())), sharded)
    chex.assert_trees_all_close(jax.device_get(found), moments, rtol=1e-5, atol=1e-4)
    subspace = subspacead.solved_subspace(moments, rank=3)
    replicated = jax.device_put(subspace, NamedSharding(mesh, P()))
    scores = residual_score(replicated, sharded)
    assert len(scores.sharding.device_set) == 8
    np.testing.assert_allclose(scores, residual_score(subspace, jnp.asarray(x)), rtol=1e-5, atol=1e-5)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def by_hand(x):
        empty = jax.lax.pcast(subspacead.init_moments(6), "data", to="varying")
        return subspacead.psum_moments(subspacead.update_moments(empty, x), "data")

    chex.assert_trees_all_close(jax.device_get(jax.jit(by_hand)(sharded)), moments, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explained_variance": 0.0}, r"explained_variance: expected a share in \(0, 1\], got 0.0"),
        ({"explained_variance": 1.1}, r"explained_variance: expected a share in \(0, 1\], got 1.1"),
        ({"rank": 7}, "rank: expected 0 to 6, the width of the features, got 7"),
        ({"rank": -1}, "rank: expected 0 to 6"),
        ({"weights": np.ones(3)}, r"weights: expected 64 numbers of at least 0, got \(3,\)"),
        ({"weights": np.r_[1.0, np.zeros(63)]}, "features: expected at least 2 rows, got 1"),
    ],
)
def test_fit_pca_refuses_options_out_of_range(rows, options, message):
    with pytest.raises(ValueError, match=message):
        subspacead.fit_pca(rows.astype(np.float32), **options)


def test_fit_pca_refuses_rows_without_a_subspace(rows, caplog):
    x = rows.astype(np.float32)
    with pytest.raises(ValueError, match="features: expected at least 2 rows, got 1"):
        subspacead.fit_pca(x[:1])
    with pytest.raises(ValueError, match=r"features: expected floating-point rows \[n, d\], got int"):
        subspacead.fit_pca(x.astype(np.int32))
    for equal in (np.ones((9, 4), np.float32), np.full((9, 4), 1e4 / 3, np.float32), np.zeros((9, 4), np.float32)):
        with pytest.raises(ValueError, match="features: expected rows that differ, got 9 equal ones"):
            subspacead.fit_pca(equal)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="features: expected finite numbers, got NaN or infinity"):
        subspacead.fit_pca(x)
    subspacead.fit_pca(rows.astype(np.float32), explained_variance=1.0)
    assert "explained_variance: at 1 the residual of normal examples is rounding noise" in caplog.text


def test_scores_refuse_another_width_and_unknown_methods(rows):
    subspace = subspacead.fit_pca(rows.astype(np.float32), rank=2)
    x = jnp.zeros((4, 5))
    with pytest.raises(ValueError, match=r"x: expected rows \[n, 6\], the width of the subspace, got shape \[4, 5\]"):
        subspacead.residual_score(subspace, x)
    with pytest.raises(ValueError, match="drop_leading: expected at least 0, got -1"):
        subspacead.residual_score(subspace, jnp.zeros((4, 6)), drop_leading=-1)
    with pytest.raises(ValueError, match="method: expected one of"):
        subspacead.residual_score(subspace, jnp.zeros((4, 6)), method="whiten")
    with pytest.raises(ValueError, match=r"batch: expected rows \[n, 6\], got shape \[4, 5\]"):
        subspacead.update_moments(subspacead.init_moments(6), x)
    with pytest.raises(ValueError, match=r"fraction: expected a share in \(0, 1\], got 0"):
        subspacead.tail_mean(x, 0)
    with pytest.raises(ValueError, match="rank: expected 1 to 63"):
        subspacead.fit_kernel_pca(rows, 64)
    with pytest.raises(ValueError, match="gamma: expected a positive number, got 0"):
        subspacead.fit_kernel_pca(rows, 2, gamma=0)
    with pytest.raises(ValueError, match="features: expected rows that differ, got 3 equal ones"):
        subspacead.fit_kernel_pca(np.ones((3, 2)), 1)
    kernel = subspacead.fit_kernel_pca(rows.astype(np.float32), 2)
    with pytest.raises(ValueError, match=r"x: expected rows \[m, 6\]"):
        subspacead.kernel_residual_score(kernel, x)


def test_every_name_of_the_public_surface_exists():
    names = {"fit_pca", "Moments", "update_moments", "merge_moments", "subspace_from_moments", "residual_score"}
    names |= {"tail_mean", "anomaly_map", "SubspaceAD", "SubspaceDetector"}
    assert names <= set(subspacead.__all__)
