"""CCA: golden correlations, invariances, dependent columns, ridge, and the form of covariances."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg

from .cases import gaussian

cca = jax.jit(linalg.cca, static_argnames=("k", "eps"))
from_covariance = jax.jit(linalg.cca_from_covariance, static_argnames=("k", "eps"))


@functools.cache
def pair(n=60, p=5, q=4):
    """Float64 features that share two directions."""
    x, y = gaussian(0, n, p), gaussian(1, n, q)
    y[:, :2] += x @ gaussian(2, p, 2)
    return x, y


def covariances(x, y):
    c = np.cov(np.c_[x, y].T)
    p = x.shape[1]
    return c[:p, :p], c[:p, p:], c[p:, p:]


@pytest.mark.parametrize("other", ["Y", "W"])
def test_cca_and_cca_from_covariance_are_golden(golden, x64, other):
    g = golden("convergent-learning/cca_cka")
    x, y, rho = g["X"], g[other], g[f"x{other.lower()}_rho"]
    found = cca(jnp.asarray(x), jnp.asarray(y))
    chex.assert_trees_all_close(found.rho, rho, atol=1e-9)
    chex.assert_trees_all_close(from_covariance(*map(jnp.asarray, covariances(x, y))).rho, rho, atol=1e-7)


def test_cca_gives_variates_of_unit_variance_that_correlate_by_rho(x64):
    x, y = pair()
    for found in (cca(jnp.asarray(x), jnp.asarray(y)), from_covariance(*map(jnp.asarray, covariances(x, y)))):
        u, v = (x - x.mean(0)) @ found.wx, (y - y.mean(0)) @ found.wy
        c = np.cov(np.c_[u, v].T)
        chex.assert_trees_all_close(c[:4, :4], np.eye(4), atol=1e-12)
        chex.assert_trees_all_close(c[4:, 4:], np.eye(4), atol=1e-12)
        chex.assert_trees_all_close(c[:4, 4:], np.diag(found.rho), atol=1e-12)
    assert (np.diff(found.rho) <= 0).all()
    chex.assert_trees_all_close(cca(jnp.asarray(x), jnp.asarray(y)).mean_y, y.mean(0), atol=1e-14)


def test_cca_does_not_change_under_invertible_maps_and_units(x64):
    x, y = pair()
    mapped = x @ (gaussian(5, 5, 5) + 3 * np.eye(5)) * np.array([1e-9, 1, 1e9, 1, 1]) + 7.0
    chex.assert_trees_all_close(
        cca(jnp.asarray(mapped), jnp.asarray(y)).rho, cca(jnp.asarray(x), jnp.asarray(y)).rho, atol=1e-8
    )
    chex.assert_trees_all_close(cca(jnp.asarray(x), jnp.asarray(x)).rho, np.ones(5), atol=1e-12)


def test_cca_of_float32_far_from_zero_is_that_of_float64(x64):
    x, y = pair()
    small = cca(jnp.asarray(x + 100, jnp.float32), jnp.asarray(y, jnp.float32))
    assert small.rho.dtype == jnp.float32
    np.testing.assert_allclose(small.rho, cca(jnp.asarray(x), jnp.asarray(y)).rho, atol=2e-5)


def test_cca_drops_dependent_and_constant_columns(x64):
    x, y = pair()
    full = x.copy()
    full[:, 4] = full[:, 0] + full[:, 1]
    full[:, 3] = 0.1
    found = cca(jnp.asarray(full), jnp.asarray(y))
    np.testing.assert_allclose(found.rho[:3], cca(jnp.asarray(x[:, :3]), jnp.asarray(y)).rho, atol=1e-12)
    assert found.rho[3] == 0
    assert (np.asarray(found.wx)[3] == 0).all()
    np.testing.assert_allclose(from_covariance(*map(jnp.asarray, covariances(full, y))).rho, found.rho, atol=1e-7)


def test_cca_with_a_ridge_is_that_of_ridged_covariances(x64):
    x, y = pair(n=4)  # fewer examples than columns
    eps = 0.3
    cxx, cxy, cyy = covariances(x, y)
    root = lambda c: np.linalg.inv(np.linalg.cholesky(c + eps * np.eye(len(c))))  # noqa: E731
    expected = np.linalg.svd(root(cxx) @ cxy @ root(cyy).T, compute_uv=False)
    found = cca(jnp.asarray(x), jnp.asarray(y), 2, eps=eps)
    np.testing.assert_allclose(found.rho, expected[:2], atol=1e-12)
    assert found.wx.shape == (5, 2)
    np.testing.assert_allclose(
        from_covariance(*map(jnp.asarray, (cxx, cxy, cyy)), k=2, eps=eps).rho, expected[:2], atol=1e-12
    )


def test_cca_of_nan_is_nan():
    x, y = (a.astype(np.float32) for a in pair())
    x[0, 0] = np.nan
    assert jnp.isnan(cca(jnp.asarray(x + 100), jnp.asarray(y)).rho).all()


@pytest.mark.parametrize(
    ("x", "y", "settings", "error", "message"),
    [
        ((6, 2), (5, 2), {}, ValueError, "of the same examples"),
        ((6, 6), (6, 2), {}, ValueError, "more examples than columns, for otherwise all correlations are 1"),
        ((6, 2), (6, 2), {"k": 3}, ValueError, "k: expected 1 to 2"),
        ((6, 2), (6, 2), {"eps": -1.0}, ValueError, "eps: expected 0 or more, got -1"),
        ((0, 2), (0, 2), {}, ValueError, "x: expected matrices"),
    ],
)
def test_cca_refuses(x, y, settings, error, message):
    with pytest.raises(error, match=message):
        linalg.cca(jnp.ones(x), jnp.ones(y), **settings)


def test_cca_refuses_other_dtypes():
    with pytest.raises(TypeError, match="x: expected float32 or float64, got int32"):
        linalg.cca(jnp.ones((6, 2), jnp.int32), jnp.ones((6, 2)))


def test_cca_from_covariance_refuses_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"cxx, cxy, cyy: expected \[p, p\]"):
        linalg.cca_from_covariance(jnp.eye(3), jnp.ones((2, 3)), jnp.eye(2))
