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

from ..variants import rest_slow
from .cases import conditioned, defect, every_shape, few, gaussian, seeds

FACTORIZATIONS = [linalg.positive_qr, linalg.cholesky_qr, linalg.cholesky_qr2, linalg.shifted_cholesky_qr3]
every_qr = pytest.mark.parametrize("qr", rest_slow(FACTORIZATIONS), ids=lambda f: f.__name__)
compiled = functools.cache(jax.jit)


def reference(x):
    q, r = np.linalg.qr(np.asarray(x, np.float64))
    signs = np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return q * signs[..., None, :], signs[..., :, None] * r


@every_shape
@every_qr
@few
@given(seed=seeds)
def test_factors_are_those_with_a_positive_diagonal(x64, qr, seed, shape):
    x = conditioned(seed, shape, 10.0)
    q, r = compiled(qr)(jnp.asarray(x))
    want_q, want_r = reference(x)
    chex.assert_trees_all_close(q, want_q, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(r, want_r, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_equal(r, np.triu(r))


@every_qr
@few
@given(seeds)
def test_single_precision_stays_near_double(qr, seed):
    x = conditioned(seed, ((3,), 40, 5), 10.0).astype(np.float32)
    q, r = compiled(qr)(jnp.asarray(x))
    assert q.dtype == r.dtype == jnp.float32
    chex.assert_trees_all_close(q, reference(x)[0], rtol=1e-7, atol=2e-5)
    chex.assert_trees_all_close(q @ r, x, rtol=1e-7, atol=5e-7)
    assert defect(q) < (2e-5 if qr is linalg.cholesky_qr else 1e-6)


@few
@given(seeds, st.sampled_from([(np.float32, 2e3, 1e-6), (np.float64, 5e7, 2e-15)]))
def test_cholesky_qr2_is_orthonormal_up_to_its_documented_condition_number(x64, seed, case):
    dtype, cond, bound = case
    x = conditioned(seed, ((20,), 50, 8), cond).astype(dtype)
    q, r = compiled(linalg.cholesky_qr2)(jnp.asarray(x))
    assert defect(q) < bound
    chex.assert_trees_all_close(q @ r, x, rtol=1e-7, atol=bound)


@few
@given(seeds, st.sampled_from([1e4, 1e5, 1e6, 1e8]), st.sampled_from([2, 8]))
def test_cholesky_qr2_never_returns_a_bad_basis(seed, cond, k):
    q, _ = compiled(linalg.cholesky_qr2)(jnp.asarray(conditioned(seed, ((50,), 40, k), cond), jnp.float32))
    for one in np.asarray(q):
        assert np.isnan(one).any() or defect(one) < 5e-6


@few
@given(seeds, st.sampled_from([(np.float32, 2e5, 1e-6), (np.float64, 1e14, 2e-15)]))
def test_shifted_cholesky_qr3_is_orthonormal_up_to_its_documented_condition_number(x64, seed, case):
    dtype, cond, bound = case
    x = conditioned(seed, ((20,), 50, 8), cond).astype(dtype)
    q, r = compiled(linalg.shifted_cholesky_qr3)(jnp.asarray(x))
    assert defect(q) < bound
    chex.assert_trees_all_close(q @ r, x, rtol=1e-7, atol=bound)


def test_cholesky_qr_loses_orthogonality_with_the_square_of_the_condition_number(x64):
    inputs = [jnp.asarray(conditioned(3, ((20,), 50, 6), cond)) for cond in (1e2, 1e4, 1e6)]
    losses = [defect(compiled(linalg.cholesky_qr)(x)[0]) for x in inputs]
    chex.assert_trees_all_close(np.diff(np.log10(losses)), 4, rtol=1e-7, atol=1)


@every_qr
def test_rank_deficiency_never_passes_silently(qr):
    x = jnp.asarray(gaussian(0, 6, 2) @ np.ones((2, 3)), jnp.float32)
    q, _ = qr(x)
    if qr is not linalg.cholesky_qr:  # whose docstring sends such input elsewhere
        assert np.isnan(q).any() or defect(q) < 1e-6


@every_qr
def test_derivatives_match_differences(x64, qr):
    x = jnp.asarray(conditioned(5, ((2,), 5, 3), 4.0))
    check_grads(compiled(qr), (x,), order=1, rtol=1e-5, atol=1e-5)


@every_qr
def test_wrong_input_is_refused(qr):
    with pytest.raises(ValueError, match="k <= n"):
        qr(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        qr(jnp.ones(3))
    with pytest.raises(TypeError, match="bfloat16"):
        qr(jnp.ones((3, 2), jnp.bfloat16))
