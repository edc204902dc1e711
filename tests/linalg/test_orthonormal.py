import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_jax import linalg

from ..variants import rest_slow
from .cases import conditioned, every_shape, few, gaussian, seeds

columns = functools.cache(jax.jit)(linalg.orthonormal_columns)


def error(q):
    """Spectral error of the Gram matrix in machine precisions of ``q``."""
    q, eps = np.asarray(q), np.finfo(q.dtype).eps
    q = q.astype(np.float64)
    return np.linalg.norm(q.mT @ q - np.eye(q.shape[-1]), 2, axis=(-2, -1)).max() / eps


@every_shape
@few
@given(seed=seeds)
def test_it_is_the_q_of_positive_qr(x64, seed, shape):
    x = jnp.asarray(conditioned(seed, shape, 10.0))
    chex.assert_trees_all_close(columns(x), linalg.positive_qr(x)[0], rtol=1e-7, atol=1e-13)


@pytest.mark.slow
def test_several_blocks_are_the_q_of_positive_qr(x64):
    x = jnp.asarray(conditioned(0, ((2,), 300, 200), 1e3))
    chex.assert_trees_all_close(columns(x), linalg.positive_qr(x)[0], rtol=1e-7, atol=1e-11)


@few
@given(seeds, st.sampled_from([(np.float32, 1e3), (np.float32, 1e6), (np.float64, 1e12), (np.float64, 1e25)]))
def test_columns_of_any_condition_come_out_orthonormal(x64, seed, case):
    dtype, cond = case
    assert error(columns(jnp.asarray(conditioned(seed, ((3,), 40, 8), cond).astype(dtype)))) < 30


@pytest.mark.parametrize("k", rest_slow([150, 6]))
@pytest.mark.parametrize("kind", rest_slow(["half zero", "zero", "one row", "equal", "rank 3", "tiny", "huge"]))
def test_dependent_columns_are_filled_up(kind, k):
    x = gaussian(0, 160, k)
    x = {
        "zero": 0 * x,
        "one row": x * (np.arange(160) == 5)[:, None],
        "equal": np.ones_like(x),
        "half zero": x * (np.arange(k) < k // 2),
        "rank 3": x[:, :3] @ gaussian(1, 3, k),
        "tiny": 1e-30 * x,
        "huge": 1e30 * x,
    }[kind]
    q = np.asarray(columns(jnp.asarray(x, jnp.float32)))
    assert error(q) < 30
    if kind == "half zero":
        of_half = linalg.positive_qr(jnp.asarray(x[:, : k // 2]))[0]
        chex.assert_trees_all_close(q[:, : k // 2], of_half, rtol=1e-7, atol=1e-4)


@pytest.mark.slow
def test_one_matrix_of_a_stack_does_not_change_another():
    x = jnp.asarray(gaussian(0, 2, 30, 5), jnp.float32)
    chex.assert_trees_all_close(columns(x.at[1].set(0))[0], columns(x)[0], rtol=1e-7, atol=1e-6)


def test_what_is_not_finite_ends_in_nan():
    assert np.isnan(columns(jnp.full((9, 3), jnp.nan))).all()


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="k <= n"):
        linalg.orthonormal_columns(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="bfloat16"):
        linalg.orthonormal_columns(jnp.ones((3, 2), jnp.bfloat16))
