"""Sinkhorn's iteration: a reference in NumPy, convergence, invariances, and the three gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from subspace_jax import linalg

N = 12
rng = np.random.default_rng(0)
S = rng.standard_normal((N, N))
WEIGHTS = rng.standard_normal((N, N))


def reference(s, eta, n_iter):
    u = v = np.zeros(len(s))
    for i in range(n_iter):
        if i % 2:
            v = -eta * (np.log(len(s)) + logsumexp((s + u[:, None]) / eta, axis=0))
        else:
            u = -eta * (np.log(len(s)) + logsumexp((s + v) / eta, axis=1))
    return len(s) * np.exp((s + u[:, None] + v) / eta), u, v


@jax.jit
def plans(s):
    return {n_iter: linalg.sinkhorn(s, 0.5, n_iter) for n_iter in (1, 4, 5, 4001)}


@jax.jit
def gradients(s):
    def of(n_iter, grad):
        return jax.grad(lambda s: jnp.sum(WEIGHTS * linalg.sinkhorn(s, 0.5, n_iter, grad).plan))(s)

    few = {grad: of(5, grad) for grad in ("stop_v", "unrolled")}
    return few, of(601, "unrolled"), of(601, "implicit")


def test_sinkhorn_is_the_reference_and_its_rows_sum_to_one(x64):
    for n_iter, found in plans(jnp.asarray(S)).items():
        for got, expected in zip(found, reference(S, 0.5, n_iter), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-9)
        if n_iter % 2:
            np.testing.assert_allclose(found.plan.sum(1), 1, atol=1e-12)
        else:
            assert np.abs(found.plan.sum(1) - 1).max() > 1e-6


def test_sinkhorn_converges_to_a_symmetric_doubly_stochastic_plan_that_no_added_row_or_column_moves(x64):
    a, b = np.random.default_rng(1).standard_normal((2, N))
    plan = plans(jnp.asarray(S))[4001].plan
    np.testing.assert_allclose(plan.sum(0), 1, atol=1e-8)
    moved = plans(jnp.asarray(S + a[:, None] + b))[4001].plan
    np.testing.assert_allclose(moved, plan, atol=1e-8)
    symmetric = plans(jnp.asarray(S + S.T))[4001].plan
    np.testing.assert_allclose(symmetric, symmetric.T, atol=1e-8)


def test_sinkhorn_of_a_large_entropy_is_uniform_and_of_a_small_one_an_assignment(x64):
    np.testing.assert_allclose(linalg.sinkhorn(jnp.asarray(S), 1e9).plan, 1 / N, atol=1e-8)
    s = jnp.asarray(np.eye(3)[[2, 0, 1]])
    np.testing.assert_allclose(linalg.sinkhorn(s, 1e-2).plan, s, atol=1e-8)


def test_sinkhorn_of_odd_iterations_is_a_softmax_in_value_and_gradient(x64):
    v = plans(jnp.asarray(S))[5].v

    def softmax(s):
        return jax.nn.softmax((s + v[None]) / 0.5, axis=1)

    np.testing.assert_allclose(plans(jnp.asarray(S))[5].plan, softmax(jnp.asarray(S)), atol=1e-12)
    expected = jax.grad(lambda s: jnp.sum(WEIGHTS * softmax(s)))(jnp.asarray(S))
    np.testing.assert_allclose(gradients(jnp.asarray(S))[0]["stop_v"], expected, atol=1e-12)


def test_sinkhorn_gradients_of_the_limit_agree_and_that_without_v_differs(x64):
    few, unrolled, implicit = gradients(jnp.asarray(S))
    np.testing.assert_allclose(implicit, unrolled, atol=1e-8)
    assert np.abs(few["stop_v"] - few["unrolled"]).max() > 1e-3


def test_sinkhorn_of_float32_and_bfloat16_is_near_that_of_float64():
    expected = reference(S, 0.5, 5)[0]
    np.testing.assert_allclose(plans(jnp.asarray(S, jnp.float32))[5].plan, expected, atol=1e-5)
    found = linalg.sinkhorn(jnp.asarray(S, jnp.bfloat16), 0.5).plan
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((S[0], 0.1), r"s: expected a square kernel \[n, n\], got shape \(12,\)"),
        ((S[:3], 0.1), "s: expected a square kernel"),
        ((np.full((2, 2), np.nan), 0.1), "s: expected finite numbers, got NaN"),
        ((S, 0.0), "eta: expected a weight of the entropy above 0, got 0.0"),
        ((S, float("nan")), "eta: expected a weight of the entropy above 0, got nan"),
        ((S, 0.1, 0), "n_iter: expected at least 1 iteration, got 0"),
        ((S, 0.1, 5, "none"), "grad: expected one of .*got 'none'"),
    ],
)
def test_sinkhorn_refuses_what_can_not_serve(arguments, error):
    with pytest.raises(ValueError, match=error):
        linalg.sinkhorn(*arguments)
