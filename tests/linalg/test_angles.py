import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from subspace_jax import linalg

from .cases import few, gaussian, seeds

angles = jax.jit(linalg.principal_angles)
distance = jax.jit(linalg.projector_distance)
PAIRS = st.sampled_from([((3,), 7, 3, 3), ((), 7, 4, 2), ((), 7, 2, 4), ((), 6, 1, 1), ((2,), 5, 4, 3), ((), 4, 4, 4)])


def bases(seed, lead, n, p, q):
    return (np.linalg.qr(gaussian(seed + i, *lead, n, k))[0] for i, k in enumerate((p, q)))


def at_angles(seed, n, theta):
    """Two bases with the given principal angles, the second one turned within its subspace."""
    k = len(theta)
    frame = np.linalg.qr(gaussian(seed, n, 2 * k))[0]
    turn = np.linalg.qr(gaussian(seed + 1, k, k))[0]
    return frame[:, :k], (frame[:, :k] * np.cos(theta) + frame[:, k:] * np.sin(theta)) @ turn


@few
@given(seeds, PAIRS)
def test_angles_match_scipy(x64, seed, case):
    a, b = bases(seed, *case)
    got = np.asarray(angles(jnp.asarray(a), jnp.asarray(b)))
    want = np.vectorize(lambda a, b: scipy.linalg.subspace_angles(a, b)[::-1], signature="(n,p),(n,q)->(m)")(a, b)
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-12)
    assert (np.diff(got) >= 0).all()


@few
@given(seeds)
def test_angles_of_all_sizes_are_accurate_at_once(x64, seed):
    theta = np.array([1e-12, 1e-8, 1e-3, 0.7, np.pi / 2 - 1e-8, np.pi / 2])
    a, b = at_angles(seed, 14, theta)
    chex.assert_trees_all_close(angles(jnp.asarray(a), jnp.asarray(b)), theta, rtol=1e-7, atol=1e-14)


@few
@given(seeds)
def test_small_angles_survive_single_precision(seed):
    theta = np.array([1e-5, 3e-5, 1e-3, 0.7, np.pi / 2 - 1e-5])
    a, b = (jnp.asarray(x, jnp.float32) for x in at_angles(seed, 14, theta))
    got = angles(a, b)
    assert got.dtype == jnp.float32
    chex.assert_trees_all_close(got, theta, rtol=1e-7, atol=1e-6)


def test_angles_of_a_basis_with_itself_vanish():
    s = linalg.random_orthonormal(jax.random.key(0), 9, 4)
    assert np.max(angles(s, s)) < 1e-6


@few
@given(seeds, PAIRS)
def test_projector_distance_is_the_frobenius_norm(x64, seed, case):
    a, b = bases(seed, *case)
    want = np.linalg.norm(a @ a.mT - b @ b.mT, axis=(-2, -1))
    chex.assert_trees_all_close(distance(jnp.asarray(a), jnp.asarray(b)), want, rtol=1e-7, atol=1e-13)


def test_projector_distance_is_accurate_when_small(x64):
    a, b = at_angles(0, 9, np.array([1e-9, 3e-9]))
    chex.assert_trees_all_close(distance(jnp.asarray(a), jnp.asarray(b)), np.sqrt(20) * 1e-9, rtol=1e-6)


@pytest.mark.parametrize("f", [linalg.principal_angles, linalg.projector_distance])
def test_leading_axes_broadcast_either_way_and_agree_with_vmap(x64, f):
    a, b = (jnp.asarray(x) for x in bases(0, (3,), 7, 3, 2))
    want = jax.vmap(functools.partial(f, a[0]))(b)
    chex.assert_trees_all_close(f(a[0], b), want, rtol=1e-7, atol=1e-14)
    chex.assert_trees_all_close(f(b, a[0]), want, rtol=1e-7, atol=1e-14)


def test_projector_distance_can_be_differentiated_at_distinct_angles(x64):
    a, b = (jnp.asarray(x) for x in at_angles(0, 7, np.array([0.3, 0.8])))
    direction = jnp.asarray(gaussian(5, 7, 2))
    direction = direction - b @ (b.T @ direction)

    @jax.jit
    def along(t):
        return linalg.projector_distance(a, linalg.positive_qr(b + t * direction)[0])

    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    chex.assert_trees_all_close(jax.grad(along)(0.0), slope, rtol=1e-8)


@pytest.mark.parametrize("f", [linalg.principal_angles, linalg.projector_distance])
def test_wrong_input_is_refused(f):
    with pytest.raises(ValueError, match="one space"):
        f(jnp.ones((4, 2)), jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="b: "):
        f(jnp.ones((4, 2)), jnp.ones((4, 5)))
    with pytest.raises(TypeError, match="a: "):
        f(jnp.ones((4, 2), jnp.int32), jnp.ones((4, 2)))
