"""HSIC and CKA: golden values, agreement of the forms, invariances, and what debiasing removes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics

linear = {debiased: jax.jit(functools.partial(metrics.linear_cka, debiased=debiased)) for debiased in (False, True)}
of_kernels = {debiased: jax.jit(functools.partial(metrics.kernel_cka, debiased=debiased)) for debiased in (False, True)}
rbf = jax.jit(metrics.rbf_kernel)
half = jax.jit(functools.partial(metrics.rbf_kernel, fraction=0.5))
criteria = jax.jit(jax.vmap(lambda k, l: (metrics.unbiased_hsic(k, l), metrics.hsic(k, l))))


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def pair(n, p=7, q=4):
    x = gaussian(0, n, p)
    return x, gaussian(1, n, q) + x[:, :q]


@pytest.mark.parametrize("other", ["Y", "W"])
def test_linear_cka_is_golden(golden, x64, other):
    g = golden("convergent-learning/cca_cka")
    for debiased, name in ((False, "linear_cka"), (True, "debiased_cka")):
        found = linear[debiased](jnp.asarray(g["X"]), jnp.asarray(g[other]))
        np.testing.assert_allclose(found, g[f"x{other.lower()}_{name}"], atol=1e-10)


@pytest.mark.parametrize("n", [5, 20])  # kernels smaller and larger than the products of features
@pytest.mark.parametrize("debiased", [False, True])
def test_linear_cka_is_kernel_cka_of_the_linear_kernels(x64, n, debiased):
    x, y = pair(n)
    np.testing.assert_allclose(
        linear[debiased](jnp.asarray(x), jnp.asarray(y)),
        of_kernels[debiased](jnp.asarray(x @ x.T), jnp.asarray(y @ y.T)),
        atol=1e-12,
    )


def test_hsic_and_unbiased_hsic_are_their_formulas_also_of_asymmetric_matrices(x64):
    n = 6
    k, l = gaussian(0, n, n), gaussian(1, n, n)
    h, one = np.eye(n) - 1 / n, np.ones(n)
    np.testing.assert_allclose(
        metrics.hsic(jnp.asarray(k), jnp.asarray(l)), np.trace(k @ h @ l @ h) / (n - 1) ** 2, atol=1e-12
    )
    k0, l0 = (m - np.diag(np.diag(m)) for m in (k, l))
    first = np.trace(k0 @ l0) + one @ k0 @ one * (one @ l0 @ one) / ((n - 1) * (n - 2))
    expected = (first - 2 / (n - 2) * one @ k0 @ l0 @ one) / (n * (n - 3))
    np.testing.assert_allclose(metrics.unbiased_hsic(jnp.asarray(k), jnp.asarray(l)), expected, atol=1e-12)


def test_unbiased_hsic_is_unbiased_and_hsic_is_not(x64):
    # The covariance of x and y is 0, so that of the linear kernels is 0 too.
    draws = jnp.asarray(gaussian(0, 400, 2, 10, 3))
    kernels = jnp.einsum("smip,smjp->smij", draws, draws)
    unbiased, biased = map(np.asarray, criteria(kernels[:, 0], kernels[:, 1]))
    assert abs(unbiased.mean()) < 4 * unbiased.std() / 20
    assert biased.mean() > 10 * biased.std() / 20


def test_debiased_cka_of_independent_features_is_near_0_where_the_biased_one_is_not(x64):
    x, y = jnp.asarray(gaussian(2, 200, 100)), jnp.asarray(gaussian(3, 200, 100))
    assert abs(linear[True](x, y)) < 0.1
    assert linear[False](x, y) > 0.3


def test_cka_does_not_change_under_orthogonal_maps_shifts_and_scale(x64):
    x, y = pair(20)
    rotation = np.linalg.qr(gaussian(4, 7, 7))[0]
    mapped = jnp.asarray(3 * x @ rotation + 5)
    x, y = jnp.asarray(x), jnp.asarray(y)
    for debiased in (False, True):
        np.testing.assert_allclose(linear[debiased](mapped, y), linear[debiased](x, y), atol=1e-12)
        np.testing.assert_allclose(linear[debiased](mapped, x), 1, atol=1e-12)
        np.testing.assert_allclose(
            of_kernels[debiased](rbf(mapped), rbf(y)), of_kernels[debiased](rbf(x), rbf(y)), atol=1e-8
        )


def test_rbf_kernel_has_the_median_distance_as_its_width(x64):
    x = gaussian(0, 20, 7)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    median = np.median(distances[np.triu_indices(20, 1)])
    found = half(jnp.asarray(x))
    np.testing.assert_allclose(found, np.exp(-(distances**2) / (2 * (median / 2) ** 2)), atol=1e-12)


def test_linear_cka_of_float32_far_from_zero_is_that_of_float64(x64):
    x, y = pair(20)
    found = linear[False](jnp.asarray(1e3 + x, jnp.float32), jnp.asarray(1e20 * y, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, linear[False](jnp.asarray(x), jnp.asarray(y)), atol=1e-3)


def test_linear_cka_of_bfloat16_is_accumulated_in_float32():
    x, y = pair(20)
    found = linear[False](jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, linear[False](jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), atol=0.01
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.linear_cka(jnp.ones((5, 2)), jnp.ones((4, 2))), r"x, y: expected \[n, p\]"),
        (lambda: metrics.linear_cka(jnp.ones((3, 2)), jnp.ones((3, 2)), debiased=True), "same 4 or more examples"),
        (lambda: metrics.hsic(jnp.ones((5, 5)), jnp.ones((4, 4))), r"k, l: expected \[n, n\]"),
        (lambda: metrics.unbiased_hsic(jnp.ones((3, 3)), jnp.ones((3, 3))), "n at least 4"),
        (lambda: metrics.kernel_cka(jnp.ones((5, 4)), jnp.ones((5, 4))), r"k, l: expected \[n, n\]"),
        (lambda: metrics.rbf_kernel(jnp.ones((1, 4))), "two or more examples"),
        (lambda: metrics.rbf_kernel(jnp.ones((3, 4)), 0.0), "fraction: expected more than 0"),
    ],
)
def test_kernel_alignment_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
