"""Estimators of classical subspace clustering: scikit-learn's checks, new points, and graphs sharded over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from subspace_jax import linalg, metrics
from subspace_jax.cluster import classical
from tests.cluster.test_clustering_common import subspaces

ALL = (
    classical.KMeans(3),
    classical.KSubspaces(3, 2),
    classical.SpectralClustering(3, 4),
    classical.TSC(3, 4),
    classical.LSR(3),
    classical.LRR(3, noise=0.1),
    classical.RobustLRR(3, 8.0),
    classical.SSCOMP(3, 3),
    classical.SSC(3),
)


def checked_estimators():
    """All, with lines for the points of the checks, which lie in a plane."""
    return [classical.KSubspaces(3) if isinstance(e, classical.KSubspaces) else e for e in ALL]


def expected_failures(estimator):
    if isinstance(estimator, classical.SSCOMP):
        return {"check_clustering": "three balls in a plane, where any two points represent any other"}
    return {}


@pytest.mark.slow
@parametrize_with_checks(checked_estimators(), expected_failed_checks=expected_failures)
def test_estimators_pass_the_checks_of_scikit_learn(estimator, check):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        check(estimator)


@pytest.mark.parametrize(
    "estimator", [pytest.param(e, marks=[] if i == 3 else pytest.mark.slow) for i, e in enumerate(ALL)], ids=str
)
def test_an_estimator_finds_subspaces_and_predicts_new_points(estimator):
    x, y, _ = subspaces(1, 12, 2, 3, 24)
    x = x.astype(np.float32)
    found = estimator.set_params(random_state=0).fit_predict(x[::2])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, estimator.labels_)
    np.testing.assert_array_equal(estimator.predict(x[::2]), found)
    np.testing.assert_array_equal(estimator.fit_predict(x[::2]), found)
    if type(estimator).__name__ not in ("KMeans", "SpectralClustering"):  # which know no lines
        assert metrics.clustering_accuracy(y[::2], found) > 0.9
        assert metrics.clustering_accuracy(y[1::2], estimator.predict(x[1::2])) > 0.9


def test_estimators_refuse_more_clusters_than_rows_nan_and_other_widths():
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="n_clusters: expected 1 to n_samples=4, got 5"):
        classical.TSC(5).fit(x)
    with pytest.raises(ValueError, match="NaN"):
        classical.KMeans(2).fit(np.where(np.eye(4, 3) > 0, np.nan, x))
    fitted = classical.KMeans(2, n_init=1, random_state=0).fit(x)
    with pytest.raises(ValueError, match="X has 2 features"):
        fitted.predict(x[:, :2])


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (classical.KMeans(2.5), TypeError, "n_clusters: expected an integer, got 2.5"),
        (classical.KMeans("2"), TypeError, "n_clusters: expected an integer, got '2'"),
        (classical.TSC(0), ValueError, "n_clusters: expected at least 1, got 0"),
        (classical.KMeans(2, n_init=0), ValueError, "n_init: expected at least 1, got 0"),
        (classical.KSubspaces(2, 1.5), TypeError, "n_components: expected an integer, got 1.5"),
        (classical.KSubspaces(2, 4), ValueError, "n_components: expected 1 to 3, the features, got 4"),
        (classical.SpectralClustering(2, 2.0), TypeError, "n_neighbors: expected an integer, got 2.0"),
        (classical.SSCOMP(2, 0), ValueError, "n_nonzeros: expected at least 1, got 0"),
        (classical.LSR(2, "10"), TypeError, "gamma: expected a number, got '10'"),
        (classical.LSR(2, keep=0), ValueError, "keep: expected at least 1, got 0"),
        (classical.LRR(2, None), TypeError, "noise: expected a number, got None"),
        (classical.RobustLRR(2, 1.0), ValueError, "gamma: expected more than 1, got 1.0"),
    ],
)
def test_estimators_name_a_parameter_of_another_type_or_out_of_range(estimator, error, message):
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    with pytest.raises(error, match=message):
        estimator.fit(x)


@pytest.mark.slow
def test_a_graph_is_clustered_again_by_another_seed_as_if_fitted_anew():
    x, _, _ = subspaces(1, 12, 2, 3, 12)
    x = x.astype(np.float32)
    estimator = classical.TSC(2, 4, random_state=0).fit(x)
    again = estimator.set_params(n_clusters=3, random_state=1).cluster_graph().labels_
    np.testing.assert_array_equal(again, classical.TSC(3, 4, random_state=1).fit_predict(x))
    with pytest.raises(ValueError, match="n_clusters: expected 1 to n_samples=36, got 37"):
        estimator.set_params(n_clusters=37).cluster_graph()


@pytest.mark.eight_devices
def test_rows_sharded_over_eight_devices_give_the_clusters_of_one():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    x, y, bases = subspaces(1, 12, 2, 3, 32)
    x = x.astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def both(x):
        key = jax.random.key(0)
        found = linalg.k_subspaces(key, x, 3, 2, restarts=8)
        z = classical.tsc(x, 4, block_size=16)
        embedding = linalg.spectral_embedding(z, 3)
        return found, z, embedding.vectors @ embedding.vectors.T

    one, eight = both(x), both(sharded)
    np.testing.assert_array_equal(one[0].assignments, eight[0].assignments)
    np.testing.assert_allclose(one[0].objective, eight[0].objective, rtol=1e-5)
    np.testing.assert_array_equal(one[1].idx, eight[1].idx)
    np.testing.assert_allclose(one[2], eight[2], atol=1e-4)
    assert metrics.clustering_accuracy(y, one[0].assignments) == 1
    assert metrics.match_subspaces(one[0].bases, jnp.asarray(bases, jnp.float32)).errors.max() < 1e-2
