import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from subspace_jax import linalg

from ..variants import rest_slow
from .cases import defect, few, gaussian, seeds

expm = jax.jit(linalg.expm)


@jax.jit
def act_on_tree(m, tree, norm):
    return linalg.expm_action(lambda y: jax.tree.map(lambda z: linalg.times(m, z), y), tree, norm)


every_lead = pytest.mark.parametrize("lead", rest_slow([((2, 1),), ((),), ((3,),)]), ids=str)
SIZES = st.sampled_from([0.0, 1e-8, 0.5, 3.0, 40.0])


@every_lead
@few
@given(seed=seeds, size=SIZES)
def test_exponential_matches_scipy(x64, seed, lead, size):
    m = size * gaussian(seed, *lead, 4, 4) / 4
    want = scipy.linalg.expm(m)
    scale = np.linalg.norm(want, axis=(-2, -1)).max()
    chex.assert_trees_all_close(expm(jnp.asarray(m)), want, rtol=1e-7, atol=1e-14 * scale * (1 + size))


@every_lead
@few
@given(seed=seeds, size=SIZES)
def test_exponential_of_a_skew_matrix_is_a_rotation(x64, seed, lead, size):
    m = size * gaussian(seed, *lead, 4, 4)
    m = m - m.mT
    for dtype, eps in ((np.float32, 1.2e-7), (np.float64, 2.2e-16)):
        got = expm(jnp.asarray(m, dtype))
        assert got.dtype == dtype
        assert defect(got) < 8 * eps * (1 + size)


def test_batches_are_scaled_one_by_one(x64):
    m = gaussian(0, 3, 4, 4) * np.array([1e-3, 1.0, 30.0])[:, None, None] / 4
    alone = jnp.stack([expm(jnp.asarray(x)) for x in m])
    chex.assert_trees_all_close(expm(jnp.asarray(m)), alone, rtol=1e-13)
    chex.assert_trees_all_close(jax.vmap(linalg.expm)(jnp.asarray(m)), alone, rtol=1e-13)


def test_derivative_is_that_of_frechet(x64):
    m, change = gaussian(0, 3, 3, 3) * np.array([0.0, 0.3, 5.0])[:, None, None] / 3, gaussian(1, 3, 3, 3)
    got = jax.jvp(expm, (jnp.asarray(m),), (jnp.asarray(change),))[1]
    want = np.stack([scipy.linalg.expm_frechet(a, b, compute_expm=False) for a, b in zip(m, change, strict=True)])
    chex.assert_trees_all_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_exponential_can_be_differentiated_twice(x64):
    check_grads(expm, (jnp.asarray(2 * gaussian(0, 3, 3)),), order=2, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_would_take_too_many_squarings_is_nan():
    assert np.isnan(linalg.expm(jnp.eye(2) * 2e3)).all()
    assert not np.isnan(linalg.expm(-jnp.eye(2) * 1.5e3)).any()


@few
@given(seeds, st.sampled_from([0.0, 0.5, 3.0, 20.0]))
def test_action_is_the_exponential_times_the_argument(x64, seed, size):
    m = size * gaussian(seed, 5, 5) / 5
    m = m - m.T
    x, norm = gaussian(seed + 1, 5, 2), np.linalg.norm(m, 2)
    for dtype, bound in ((np.float32, 1e-6), (np.float64, 2e-15)):
        operator = jnp.asarray(m, dtype)
        start = {"left": jnp.asarray(x[:, :1], dtype), "right": jnp.asarray(x[:, 1:], dtype)}
        got = act_on_tree(operator, start, jnp.asarray(norm, dtype))
        want = scipy.linalg.expm(np.asarray(operator, np.float64)) @ x
        chex.assert_trees_all_close(
            np.hstack([got["left"], got["right"]]), want, rtol=1e-7, atol=bound * 4 * (1 + norm)
        )


@pytest.mark.slow
def test_action_can_be_differentiated_and_batched(x64):
    m, x = jnp.asarray(gaussian(0, 2, 3, 3)), jnp.asarray(gaussian(1, 2, 3, 1))

    @jax.jit
    def act(m, x):
        return linalg.expm_action(lambda y: linalg.times(m, y), x, jnp.linalg.norm(m))

    check_grads(act, (m[0], x[0]), order=1, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.vmap(act)(m, x), linalg.expm(m) @ x, rtol=1e-12)


def test_action_beyond_its_steps_is_nan():
    assert np.isnan(linalg.expm_action(lambda y: 40 * y, jnp.ones(1), jnp.asarray(40.0))).all()


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="square"):
        linalg.expm(jnp.ones((3, 2)))
    with pytest.raises(TypeError, match="bfloat16"):
        linalg.expm(jnp.ones((2, 2), jnp.bfloat16))
