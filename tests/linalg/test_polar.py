import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from subspace_jax import linalg

from .cases import conditioned, defect, every_shape, few, gaussian, nearest_orthonormal, seeds

compiled = functools.cache(jax.jit)


@every_shape
@few
@given(seed=seeds, cond=st.sampled_from([1.0, 10.0, 1e3]))
def test_polar_is_the_nearest_orthonormal_matrix(x64, seed, shape, cond):
    x = conditioned(seed, shape, cond)
    got = compiled(linalg.polar)(jnp.asarray(x))
    chex.assert_trees_all_close(got, nearest_orthonormal(x), rtol=1e-7, atol=1e-14 * cond)


@few
@given(seeds, st.sampled_from([(np.float32, 1e3), (np.float32, 2e3), (np.float64, 1e5), (np.float64, 5e7)]))
def test_error_is_precision_times_condition_number_up_to_the_documented_ones(x64, seed, case):
    dtype, cond = case
    x = conditioned(seed, ((4,), 60, 8), cond).astype(dtype)
    got, eps = compiled(linalg.polar)(jnp.asarray(x)), np.finfo(dtype).eps
    assert got.dtype == dtype
    assert defect(got) < 16 * eps
    chex.assert_trees_all_close(got, nearest_orthonormal(x), rtol=1e-7, atol=eps * cond)


def test_polar_ignores_scale(x64):
    x = jnp.asarray(gaussian(1, 7, 3))
    for scale in (1e-12, 1e12):
        chex.assert_trees_all_close(linalg.polar(scale * x), linalg.polar(x), rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 3), (3, 3)])
def test_a_singular_matrix_gives_nan_and_no_bad_basis(shape):
    x = np.asarray(gaussian(2, *shape), np.float32)
    x[:, 1] = 0
    assert np.isnan(linalg.polar(jnp.asarray(x))).all()
    assert np.isnan(linalg.polar(jnp.zeros(shape))).all()


@every_shape
@few
@given(seed=seeds)
def test_a_polar_step_squares_the_error(x64, seed, shape):
    lead, n, k = shape
    s = nearest_orthonormal(gaussian(seed, *lead, n, k)) + 1e-4 * gaussian(seed + 1, *lead, n, k)
    before, after = (linalg.orthonormality_error(x) for x in (jnp.asarray(s), linalg.polar_step(jnp.asarray(s))))
    assert (np.asarray(after) <= 0.76 * np.asarray(before) ** 2 + 1e-14).all()


@pytest.mark.slow
def test_derivative_matches_differences(x64):
    x = jnp.asarray(conditioned(5, ((2,), 5, 3), 4.0))
    check_grads(compiled(linalg.polar), (x,), order=1, rtol=1e-5, atol=1e-5)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="k <= n"):
        linalg.polar(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="float16"):
        linalg.polar_step(jnp.ones((3, 2), jnp.float16))
    with pytest.raises(ValueError, match="num_iters"):
        linalg.polar(jnp.ones((3, 1)), 0)
