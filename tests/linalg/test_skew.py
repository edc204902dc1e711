"""Rotations from skew-symmetric matrices, and matrices within a distance of orthogonal ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, losses


@pytest.mark.parametrize("method", ["expm", "cayley"])
def test_orthogonal_from_skew_gives_rotations_and_the_identity_at_zero(method):
    a = jax.random.normal(jax.random.key(0), (7, 7))
    q = linalg.orthogonal_from_skew(a, method)
    np.testing.assert_allclose(q.T @ q, np.eye(7), atol=1e-5)
    assert np.linalg.det(np.asarray(q, np.float64)) == pytest.approx(1, abs=1e-4)
    np.testing.assert_array_equal(linalg.orthogonal_from_skew(a + a.T, method), np.eye(7))  # no skew part


def test_both_maps_of_orthogonal_from_skew_are_those_of_their_definition(x64):
    a = np.random.default_rng(1).standard_normal((5, 5))
    s, i = a - a.T, np.eye(5)
    np.testing.assert_allclose(linalg.orthogonal_from_skew(jnp.asarray(a), "expm"), linalg.expm(jnp.asarray(s)))
    cayley = (i - s) @ np.linalg.inv(i + s)
    np.testing.assert_allclose(linalg.orthogonal_from_skew(jnp.asarray(a), "cayley"), cayley, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9)])
def test_project_to_lambda_ball_reaches_the_bound_and_keeps_what_is_inside(shape, x64):
    w = jnp.asarray(np.random.default_rng(2).standard_normal(shape))
    inside = linalg.project_to_lambda_ball(w, 0.5)
    assert losses.orthogonality_residual(inside) == pytest.approx(0.5, abs=1e-9)
    np.testing.assert_allclose(linalg.project_to_lambda_ball(inside, 0.6), inside, atol=1e-9)
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(linalg.project_to_lambda_ball(w, 0.0), u @ vt, atol=1e-9)


def test_project_to_lambda_ball_and_orthogonal_from_skew_refuse_what_can_not_serve():
    with pytest.raises(ValueError, match="lam: expected a bound of at least 0, got -1"):
        linalg.project_to_lambda_ball(jnp.eye(3), -1)
    with pytest.raises(ValueError, match="method: expected one of"):
        linalg.orthogonal_from_skew(jnp.eye(3), "qr")
    with pytest.raises(ValueError, match="a: expected square matrices"):
        linalg.orthogonal_from_skew(jnp.ones((3, 2)))
