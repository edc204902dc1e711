import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from subspace_jax import linalg

from ..variants import rest_slow
from .cases import defect, every_shape, few, gaussian, seeds


@every_shape
@few
@given(seed=seeds)
def test_products_match_numpy_and_broadcast_any_leading_axes(x64, seed, shape):
    lead, n, k = shape
    x, y, m = gaussian(seed, *lead, n, k), gaussian(seed + 1, n, 2), gaussian(seed + 2, *lead, k, 2)
    chex.assert_trees_all_close(linalg.gram(jnp.asarray(x), jnp.asarray(y)), x.mT @ y, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(linalg.gram(jnp.asarray(y), jnp.asarray(x)), y.T @ x, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(linalg.times(jnp.asarray(x), jnp.asarray(m)), x @ m, rtol=1e-7, atol=1e-13)


def test_products_ask_for_full_precision():
    x = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    for f, y in ((linalg.gram, x), (linalg.times, jax.ShapeDtypeStruct((2, 3), jnp.float32))):
        assert "HIGHEST" in str(jax.make_jaxpr(f)(x, y))


def test_working_dtype_is_at_least_single(x64):
    half, single, double = (jnp.zeros((), d) for d in (jnp.bfloat16, jnp.float32, jnp.float64))
    assert linalg.working_dtype(half) == linalg.working_dtype(half, single) == jnp.float32
    assert linalg.working_dtype(half, double) == jnp.float64


def test_broadcast_leading_keeps_the_matrices():
    a, b = linalg.broadcast_leading(jnp.ones((3, 1, 4, 2)), jnp.ones((5, 2, 6)))
    assert (a.shape, b.shape) == ((3, 5, 4, 2), (3, 5, 2, 6))
    with pytest.raises(ValueError):
        linalg.broadcast_leading(jnp.ones((3, 4, 2)), jnp.ones((2, 4, 2)))


@every_shape
@pytest.mark.parametrize(("dtype", "bound"), rest_slow([(jnp.float32, 1e-6), (jnp.float64, 2e-15)]))
def test_random_bases_are_orthonormal(x64, shape, dtype, bound):
    lead, n, k = shape
    s = linalg.random_orthonormal(jax.random.key(0), n, k, lead, dtype)
    assert s.shape == (*lead, n, k)
    assert s.dtype == dtype
    assert defect(s) < bound
    assert np.max(linalg.orthonormality_error(s)) < 4 * bound


def test_random_bases_are_uniform():
    s = np.asarray(linalg.random_orthonormal(jax.random.key(1), 5, 2, (4000,)), np.float64)
    # A uniform projector has mean k / n times the identity; entries have mean 0 and variance 1 / n.
    chex.assert_trees_all_close((s @ s.mT).mean(0), 0.4 * np.eye(5), rtol=1e-7, atol=0.03)
    chex.assert_trees_all_close(s.mean(0), 0, rtol=1e-7, atol=0.03)
    chex.assert_trees_all_close((s**2).mean(0), 0.2, rtol=1e-7, atol=0.02)


@every_shape
@few
@given(seed=seeds)
def test_orthonormality_error_is_the_frobenius_norm(x64, seed, shape):
    lead, n, k = shape
    x = gaussian(seed, *lead, n, k)
    want = np.linalg.norm(x.mT @ x - np.eye(k), axis=(-2, -1))
    chex.assert_trees_all_close(linalg.orthonormality_error(jnp.asarray(x)), want, rtol=1e-13)
    assert linalg.orthonormality_error(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(("k", "dtype", "error"), [(0, "float32", ValueError), (4, "float32", ValueError)])
def test_impossible_dimensions_are_refused(k, dtype, error):
    with pytest.raises(error, match="k: "):
        linalg.random_orthonormal(jax.random.key(0), 3, k, dtype=dtype)


def test_coarse_dtypes_are_refused():
    with pytest.raises(TypeError, match="bfloat16"):
        linalg.random_orthonormal(jax.random.key(0), 3, 2, dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match="int32"):
        linalg.orthonormality_error(jnp.ones((3, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        linalg.orthonormality_error(jnp.ones(3))
