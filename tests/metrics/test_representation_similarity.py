"""Similarities of representations: golden values, 1 for themselves, and what leaves them as they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics


@jax.jit
def SCORES(x, y):
    rho = linalg.cca(x, y).rho
    return {
        "google_mean_threshold98": metrics.cca_mean(rho, 0.98),
        "r_squared_cca": metrics.cca_mean(jnp.square(rho)),
        "mean": metrics.cca_mean(rho),
        "svcca99": metrics.svcca(x, y, criterion="singular_values"),
        "svcca": metrics.svcca(x, y),
        "pwcca_definition": metrics.pwcca(x, y),
        "procrustes_similarity": metrics.procrustes_similarity(x, y),
        "linreg_r2": metrics.linear_regression_r2(x, y),
    }


@functools.cache
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((180, 15)) * np.linspace(1, 3, 15)
    return x, x @ rng.standard_normal((15, 15)) + rng.standard_normal((180, 15)), np.linalg.qr(rng.random((15, 15)))[0]


@pytest.mark.parametrize("other", ["Y", "W"])
def test_similarities_are_golden(golden, x64, other):
    g = golden("convergent-learning/cca_cka")
    found, name = SCORES(jnp.asarray(g["X"]), jnp.asarray(g[other])), f"x{other.lower()}"
    for key in found.keys() - {"mean", "svcca"}:
        np.testing.assert_allclose(found[key], g[f"{name}_{key}"], atol=1e-9, err_msg=key)
    np.testing.assert_allclose(found["mean"], g[f"{name}_rho"].mean(), atol=1e-9)


def test_similarities_of_a_representation_with_itself_are_1_and_all_are_in_0_to_1(x64):
    x, y, _ = data()
    for name, value in SCORES(jnp.asarray(x), jnp.asarray(x)).items():
        np.testing.assert_allclose(value, 1, atol=1e-10, err_msg=name)
    for name, value in SCORES(jnp.asarray(x), jnp.asarray(y)).items():
        assert 0 < value < 1, name


def test_similarities_do_not_change_under_the_maps_they_promise_to_ignore(x64):
    x, y, rotation = data()
    plain = SCORES(jnp.asarray(x), jnp.asarray(y))
    rotated = SCORES(jnp.asarray(3 * x @ rotation + 1), jnp.asarray(y))
    mapped = SCORES(jnp.asarray(x), jnp.asarray(y @ (rotation + 0.5 * np.eye(15))))
    for name in ("mean", "svcca", "procrustes_similarity", "linreg_r2", "r_squared_cca"):
        np.testing.assert_allclose(rotated[name], plain[name], atol=1e-8, err_msg=name)
    for name in ("mean", "pwcca_definition", "linreg_r2", "r_squared_cca"):
        np.testing.assert_allclose(mapped[name], plain[name], atol=1e-8, err_msg=name)
    assert abs(mapped["procrustes_similarity"] - plain["procrustes_similarity"]) > 1e-3


def test_svcca_keeps_the_fewest_directions_that_hold_the_variance(x64):
    # Two directions hold 98% and 1.5%; the third is all that x and y do not share.
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.standard_normal((180, 4)) @ np.eye(4))[0]
    q = np.linalg.qr(q - q.mean(0))[0]
    x, y = q[:, :3] * np.sqrt([0.98, 0.015, 0.005]), q[:, [0, 1, 3]] * np.sqrt([0.98, 0.015, 0.005])
    two, three = (float(metrics.svcca(jnp.asarray(x), jnp.asarray(y), keep)) for keep in (0.99, 0.999))
    np.testing.assert_allclose([two, three], [1, 2 / 3], atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: metrics.svcca(x, y[:5]), r"x, y: expected \[n, p\] and \[n, q\] of the same examples"),
        (lambda x, y: metrics.svcca(x, y, 1.5), "keep: expected a share above 0, at most 1, got 1.5"),
        (lambda x, y: metrics.svcca(x, y, criterion="size"), "criterion: expected variance or singular_values"),
        (lambda x, y: metrics.pwcca(x[:2], y[:2]), "more examples than columns"),
        (lambda x, y: metrics.procrustes_similarity(x, y[:5]), "of the same examples"),
        (lambda x, y: metrics.linear_regression_r2(x[:2], y[:2]), "y: expected more examples than columns"),
        (lambda x, y: metrics.cca_mean(x[0], 0.0), "threshold: expected a share above 0"),
    ],
)
def test_similarities_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((6, 2)), jnp.ones((6, 2)))
