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
from .cases import defect, few, gaussian, seeds

canonical = jax.jit(linalg.canonical_svd)
angles = jax.jit(linalg.principal_angles)
randomized = jax.jit(linalg.randomized_svd, static_argnums=2, static_argnames=("oversample", "power_steps"))
iterate = functools.cache(lambda steps: jax.jit(functools.partial(linalg.subspace_iteration, steps=steps)))
SPECTRUM = 0.7 ** np.arange(12)


def with_spectrum(seed, lead, m, n, spectrum):
    u = np.linalg.qr(gaussian(seed, *lead, m, len(spectrum)))[0]
    v = np.linalg.qr(gaussian(seed + 1, *lead, n, len(spectrum)))[0]
    return (u * spectrum) @ v.mT, u, v


def largest_entries(u):
    return np.take_along_axis(u, np.abs(u).argmax(-2, keepdims=True), -2)


@few
@given(seeds, st.sampled_from([((2,), 6, 4), ((), 4, 6), ((), 5, 5)]))
def test_canonical_svd_is_the_svd(x64, seed, shape):
    lead, m, n = shape
    x = gaussian(seed, *lead, m, n)
    u, s, vt = (np.asarray(a) for a in canonical(jnp.asarray(x)))
    chex.assert_trees_all_close((u * s[..., None, :]) @ vt, x, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(s, np.linalg.svd(x, compute_uv=False), rtol=1e-7, atol=1e-13)
    assert max(defect(u), defect(vt.mT)) < 1e-14
    assert (largest_entries(u) > 0).all()


@few
@given(seeds)
def test_signs_do_not_depend_on_those_of_the_input(x64, seed):
    u = gaussian(seed, 3, 6, 4)
    flips = np.where(gaussian(seed + 1, 3, 1, 4) < 0, -1.0, 1.0)
    one, other = ((x * linalg.canonical_signs(jnp.asarray(x))[..., None, :]) for x in (u, u * flips))
    chex.assert_trees_all_equal(one, other)
    assert linalg.canonical_signs(jnp.asarray(u, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("power_steps", [0, 2])
def test_randomized_svd_keeps_the_bound_of_halko_martinsson_tropp(x64, power_steps):
    rank, oversample, m, n = 4, 4, 30, 20
    x, _, _ = with_spectrum(0, (), m, n, 0.9 ** np.arange(20))
    errors = []
    for i in range(10):
        key, sizes = jax.random.key(i), {"oversample": oversample, "power_steps": power_steps}
        u, s, vt = (np.asarray(a) for a in randomized(key, jnp.asarray(x), rank, **sizes))
        errors.append(np.linalg.norm((u * s) @ vt - x, 2))
    width = rank + oversample
    sketch = 1 + np.sqrt(rank / (oversample - 1)) + np.e * np.sqrt(width * (min(m, n) - rank)) / oversample
    best = 0.9**rank
    assert best * (1 - 1e-12) <= min(errors)
    assert np.mean(errors) <= (1 + sketch ** (1 / (2 * power_steps + 1))) * best


@pytest.mark.parametrize("shape", rest_slow([(((), 12, 15),), (((2,), 14, 12),)]), ids=str)
@few
@given(seed=seeds)
def test_randomized_svd_is_exact_for_low_rank(x64, seed, shape):
    lead, m, n = shape
    x, u, v = with_spectrum(seed, lead, m, n, SPECTRUM[:3])
    got_u, s, got_vt = randomized(jax.random.key(seed % 1000), jnp.asarray(x), 3)
    chex.assert_trees_all_close(s, np.broadcast_to(SPECTRUM[:3], s.shape), rtol=1e-7, atol=1e-13)
    signs = np.sign(largest_entries(u))
    chex.assert_trees_all_close(got_u, u * signs, rtol=1e-7, atol=1e-11)
    chex.assert_trees_all_close(got_vt, (v * signs).mT, rtol=1e-7, atol=1e-11)


@pytest.mark.slow
def test_randomized_svd_works_in_single_precision():
    x, _, _ = with_spectrum(0, (2,), 40, 30, SPECTRUM)
    u, s, vt = randomized(jax.random.key(0), jnp.asarray(x, jnp.float32), 4)
    assert u.dtype == s.dtype == vt.dtype == jnp.float32
    assert max(defect(u), defect(vt.mT)) < 1e-6
    chex.assert_trees_all_close(s, np.broadcast_to(SPECTRUM[:4], (2, 4)), rtol=1e-3)


@pytest.mark.parametrize(("rows", "width", "columns"), [(9, 4, 7), (5, 8, 12), (6, 7, 3)])
def test_product_svd_is_the_svd_of_the_product(x64, rows, width, columns):
    a, b = jnp.asarray(gaussian(1, 2, rows, width)), jnp.asarray(gaussian(2, 2, width, columns))
    # Dependent columns, and zeros.
    a = a.at[..., 2].set(a[..., 0]).at[..., 1].set(0)
    u, s, vt = jax.jit(linalg.product_svd)(a, b)
    wanted = linalg.canonical_svd(a @ b)
    assert s.shape == (2, min(rows, width, columns))
    chex.assert_trees_all_close(s, wanted[1][:, : s.shape[-1]], atol=1e-12)
    chex.assert_trees_all_close((u * s[:, None]) @ vt, a @ b, atol=1e-12)
    assert max(defect(x) for x in (u, vt.mT)) < 1e-12


# Steps of 9 and of 25 in all: each call goes on from where the last one ended.
@pytest.mark.parametrize(("nine", "many"), rest_slow([((5, 4), (5, 4, 4, 4, 4, 4)), ((9,), (25,))]), ids=str)
@few
@given(seed=seeds)
def test_subspace_iteration_converges_with_the_squared_gap(x64, seed, nine, many):
    rank, gap = 3, 0.5
    spectrum = np.concatenate([[1.0, 0.9, 0.8], 0.8 * gap * 0.9 ** np.arange(7)])
    x, u, _ = with_spectrum(seed, (2,), 14, 10, spectrum)
    start = jnp.asarray(gaussian(seed + 2, 2, 14, rank))

    def tangent(*calls):  # of the largest angle to the leading subspace
        basis = start
        for steps in calls:
            basis = iterate(steps)(jnp.asarray(x), basis)[0]
        return np.tan(angles(jnp.asarray(u[..., :rank]), basis)[..., -1])

    assert (tangent(*nine) <= 1.5 * tangent(5) * gap**8).all()
    assert (tangent(*many) < 1e-12).all()


def test_subspace_iteration_broadcasts_and_keeps_a_fixed_point(x64):
    x, u, v = with_spectrum(3, (), 10, 8, SPECTRUM[:6])
    start = np.stack([u[:, :2], -u[:, :2]])
    got_u, s, vt = iterate(1)(jnp.asarray(x), jnp.asarray(start))
    signs = np.sign(largest_entries(u[:, :2]))
    chex.assert_trees_all_close(got_u, np.stack([u[:, :2] * signs] * 2), rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(s, np.stack([SPECTRUM[:2]] * 2), rtol=1e-7, atol=1e-14)
    chex.assert_trees_all_close(vt, np.stack([(v[:, :2] * signs).T] * 2), rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda key, x: linalg.randomized_svd(key, x, 0), ValueError, "rank: "),
        (lambda key, x: linalg.randomized_svd(key, x, 4), ValueError, "rank: "),
        (lambda key, x: linalg.randomized_svd(key, x, 2, power_steps=-1), ValueError, "power_steps"),
        (lambda key, x: linalg.randomized_svd(key, x.astype(jnp.bfloat16), 2), TypeError, "bfloat16"),
        (lambda key, x: linalg.randomized_svd(key, x[0], 1), ValueError, "matrices"),
        (lambda key, x: linalg.canonical_svd(x.astype(jnp.int32)), TypeError, "int32"),
        (lambda key, x: linalg.canonical_svd(x.astype(jnp.bfloat16)), TypeError, "bfloat16"),
        (lambda key, x: linalg.product_svd(x, x), ValueError, "a, b: "),
        (lambda key, x: linalg.product_svd(x, x.T.astype(jnp.bfloat16)), TypeError, "b: |bfloat16"),
        (lambda key, x: linalg.subspace_iteration(x, x[:3]), ValueError, "basis: "),
        (lambda key, x: linalg.subspace_iteration(x, x, 0), ValueError, "steps: "),
        (lambda key, x: linalg.subspace_iteration(x, x.astype(jnp.bfloat16)), TypeError, "basis: "),
    ],
)
def test_wrong_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(jax.random.key(0), jnp.ones((5, 3)))


@pytest.mark.slow
def test_what_is_infinite_gives_nan_and_ends():
    """LAPACK's decomposition of an infinite entry does not come back."""
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        x = jnp.ones((5, 3)).at[1, 2].set(bad)
        for made in (linalg.canonical_svd(x), linalg.randomized_svd(jax.random.key(0), x, 2)):
            assert all(bool(jnp.all(jnp.isnan(y))) for y in made)
        assert jnp.all(jnp.isnan(linalg.principal_angles(x, jnp.eye(5, 2))))
