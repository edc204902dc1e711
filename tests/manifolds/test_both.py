"""What holds on either manifold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from subspace_jax.manifolds import grassmann, stiefel

from ..linalg.cases import SHAPES, defect, every_shape, few, gaussian, seeds
from ..variants import rest_slow
from .cases import compiled, every_manifold, point, same_point, stencil, tangent

sizes = st.sampled_from([0.0, 1e-6, 0.3, 1.4])
every_retraction = pytest.mark.parametrize("method", rest_slow(grassmann.RETRACTIONS))
qr_first = pytest.mark.parametrize("method", rest_slow(grassmann.RETRACTIONS, "qr"))


@every_manifold
def test_surface_is_documented_and_complete(manifold):
    both = set(grassmann.__all__) & set(stiefel.__all__)
    assert {"align", "principal_angles"} == set(grassmann.__all__) ^ both
    assert both == set(stiefel.__all__)
    for name in manifold.__all__:
        assert hasattr(manifold, name)


@every_shape
@every_manifold
@few
@given(seed=seeds)
def test_projection_is_onto_the_tangent_space_and_idempotent(x64, manifold, seed, shape):
    s, x = point(seed, shape), jnp.asarray(gaussian(seed + 1, *shape[0], *shape[1:]))
    h = compiled(manifold.tangent_project)(s, x)
    overlap = s.mT @ h
    chex.assert_trees_all_close(overlap if manifold is grassmann else overlap + overlap.mT, 0, rtol=1e-7, atol=1e-14)
    chex.assert_trees_all_close(manifold.tangent_project(s, h), h, rtol=1e-7, atol=1e-14)
    # What is taken away is orthogonal to the tangent space.
    overlap = jnp.sum((x - h) * tangent(manifold, s, seed + 2), axis=(-2, -1))
    chex.assert_trees_all_close(overlap, jnp.zeros_like(overlap), rtol=1e-7, atol=1e-13)


@every_shape
@every_manifold
@few
@given(seed=seeds)
def test_riemannian_gradient_represents_the_derivative(x64, manifold, seed, shape):
    s, g = point(seed, shape), jnp.asarray(gaussian(seed + 1, *shape[0], *shape[1:]))
    h, gradient = tangent(manifold, s, seed + 2), compiled(manifold.riemannian_gradient)(s, g)
    same_point(stiefel, manifold.tangent_project(s, gradient), gradient, 1e-14)
    chex.assert_trees_all_close(manifold.inner(s, gradient, h), jnp.sum(g * h, axis=(-2, -1)), rtol=1e-7, atol=1e-13)


@every_shape
@every_manifold
@few
@given(seed=seeds, size=sizes)
def test_log_inverts_exp(x64, manifold, seed, shape, size):
    s = point(seed, shape)
    h = tangent(manifold, s, seed + 1, size)
    y = compiled(manifold.exp)(s, h)
    assert defect(y) < 1e-14
    chex.assert_trees_all_close(compiled(manifold.log)(s, y), h, rtol=1e-7, atol=1e-12)
    norm = jnp.sqrt(manifold.inner(s, h, h))
    chex.assert_trees_all_close(compiled(manifold.dist)(s, y), norm, rtol=1e-7, atol=1e-13)


@pytest.mark.slow
@every_shape
@every_manifold
@few
@given(seed=seeds)
def test_exp_inverts_log_between_near_points(x64, manifold, seed, shape):
    s = point(seed, shape)
    y = jnp.asarray(np.linalg.qr(s + 0.1 * gaussian(seed + 1, *s.shape))[0])
    y = y * jnp.where(jnp.diagonal(s.mT @ y, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
    same_point(manifold, compiled(manifold.exp)(s, compiled(manifold.log)(s, y)), y, 1e-13)


@pytest.mark.slow
@every_shape
@every_manifold
@few
@given(seed=seeds)
def test_distance_is_symmetric_and_unchanged_by_rotations(x64, manifold, seed, shape):
    s = point(seed, shape)
    y = compiled(manifold.exp)(s, tangent(manifold, s, seed + 1, 1.0))
    turn = point(seed + 2, ((), shape[1], shape[1]))
    dist = compiled(manifold.dist)
    chex.assert_trees_all_close(dist(s, y), dist(y, s), rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(dist(turn @ s, turn @ y), dist(s, y), rtol=1e-7, atol=1e-13)


@every_shape
@every_manifold
@few
@given(seed=seeds, size=st.sampled_from([0.5, 6.0, 20.0]))
def test_exp_is_a_geodesic_however_long(x64, manifold, seed, shape, size):
    s = point(seed, shape)
    h = tangent(manifold, s, seed + 1, size)
    exp = compiled(manifold.exp)
    once, halfway = exp(s, h), exp(s, h, 0.5)
    assert defect(once) < 1e-14 * (1 + size)
    velocity = stencil(lambda e: exp(s, h, 0.5 + e), 1e-3 / size)
    same_point(manifold, exp(halfway, velocity, 0.5), once, 1e-8 * size)
    chex.assert_trees_all_close(exp(once, -velocity_at_end(manifold, s, h)), s, rtol=1e-7, atol=1e-12 * (1 + size))


def velocity_at_end(manifold, s, h):
    return jax.jvp(lambda t: compiled(manifold.exp)(s, h, t), (1.0,), (1.0,))[1]


@every_shape
@every_manifold
@few
@given(seed=seeds, size=st.sampled_from([0.0, 0.4, 3.0]))
def test_transport_is_an_isometry(x64, manifold, seed, shape, size):
    s = point(seed, shape)
    h, a, b = tangent(manifold, s, seed + 1, size), tangent(manifold, s, seed + 2), tangent(manifold, s, seed + 3)
    carry, y = compiled(manifold.parallel_transport), compiled(manifold.exp)(s, h, 0.7)
    c, d = carry(s, h, a, 0.7), carry(s, h, b, 0.7)
    chex.assert_trees_all_close(manifold.inner(y, c, d), manifold.inner(s, a, b), rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(manifold.tangent_project(y, c), c, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(carry(s, h, 2 * a - b, 0.7), 2 * c - d, rtol=1e-7, atol=1e-13)


@pytest.mark.slow
@every_shape
@every_manifold
@few
@given(seed=seeds, size=st.sampled_from([0.4, 3.0]))
def test_transport_takes_the_velocity_along(x64, manifold, seed, shape, size):
    s = point(seed, shape)
    h = tangent(manifold, s, seed + 1, size)
    got = compiled(manifold.parallel_transport)(s, h, h, 0.7)
    chex.assert_trees_all_close(got, stencil(lambda e: compiled(manifold.exp)(s, h, 0.7 + e)), rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@every_shape
@every_manifold
@few
@given(seed=seeds)
def test_transport_there_and_back_is_the_identity(x64, manifold, seed, shape):
    s = point(seed, shape)
    h, d = tangent(manifold, s, seed + 1, 1.3), tangent(manifold, s, seed + 2)
    carry, y = compiled(manifold.parallel_transport), compiled(manifold.exp)(s, h)
    chex.assert_trees_all_close(carry(y, -carry(s, h, h), carry(s, h, d)), d, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("shape", rest_slow([(SHAPES[0],), (((), 9, 3),)]), ids=str)
@pytest.mark.parametrize(("manifold", "order"), [(grassmann, 2), (stiefel, 1)], ids=["grassmann", "stiefel"])
def test_projection_transport_is_near_parallel_transport(x64, manifold, order, shape):
    s = point(0, shape)
    h, d = tangent(manifold, s, 1, 1.0), tangent(manifold, s, 2)

    def gap(t):
        got = manifold.projection_transport(compiled(manifold.exp)(s, h, t), d)
        return np.linalg.norm(got - compiled(manifold.parallel_transport)(s, h, d, t))

    chex.assert_trees_all_close(np.log10(gap(1e-2) / gap(1e-3)), order, rtol=1e-7, atol=0.1)


@every_shape
@every_manifold
@qr_first
@few
@given(seed=seeds, size=st.sampled_from([0.0, 1e-6, 0.5, 8.0]))
def test_retractions_are_orthonormal_and_start_along_the_vector(x64, manifold, method, seed, shape, size):
    s = point(seed, shape)
    h, step = tangent(manifold, s, seed + 1, size), compiled(manifold.retract, method=method)
    assert defect(step(s, h)) < 1e-13
    turned = stencil(lambda e: step(s, e * h), 1e-3 / max(size, 1.0))
    chex.assert_trees_all_close(manifold.tangent_project(s, turned), h, rtol=1e-7, atol=1e-8 * max(size, 1.0))
    same_point(manifold, step(s, 0 * h), s, 1e-14)


@every_shape
@every_manifold
@pytest.mark.parametrize("method", rest_slow(["qr", "polar"]))
@few
@given(seed=seeds, drift=st.sampled_from([0.0, 1e-6, 1e-2]))
def test_reorthonormalize_moves_by_no_more_than_the_drift(x64, manifold, method, seed, shape, drift):
    s = point(seed, shape)
    noise = gaussian(seed + 1, *s.shape)
    drifted = s + drift * noise
    fixed = compiled(manifold.reorthonormalize, method=method)(drifted)
    assert np.max(np.abs(fixed - drifted)) <= 2 * drift * np.linalg.norm(noise) + 1e-14
    before = np.asarray(manifold.orthonormality_error(drifted))
    # QR is exact; the Newton step squares what there was.
    assert (manifold.orthonormality_error(fixed) <= 1e-13 + (before**2 if method == "polar" else 0)).all()
    q = np.linalg.qr(np.asarray(drifted))[0]
    same_point(grassmann, fixed if method == "qr" else np.linalg.qr(fixed)[0], q, 1e-13)


@pytest.mark.slow
@every_manifold
@every_shape
def test_a_zero_vector_moves_nothing_and_its_derivatives_are_finite(x64, manifold, shape):
    s = point(0, shape)
    zero, d = jnp.zeros_like(s), tangent(manifold, s, 1)
    chex.assert_trees_all_close(compiled(manifold.parallel_transport)(s, zero, d), d, rtol=1e-7, atol=1e-14)
    # The derivative of exp at the zero vector is the identity.
    moved = jax.jvp(lambda h: compiled(manifold.exp)(s, h), (zero,), (d,))[1]
    chex.assert_trees_all_close(moved, d, rtol=1e-7, atol=1e-14)


@pytest.mark.slow
@every_manifold
@pytest.mark.parametrize("shape", [SHAPES[0]])
def test_distance_of_a_point_from_itself_has_gradient_zero(x64, manifold, shape):
    s = point(0, shape)
    slope = jax.jit(jax.grad(lambda y, s: jnp.sum(manifold.dist(s, y))))(s, s)
    chex.assert_trees_all_equal(slope, 0)


@every_manifold
@pytest.mark.parametrize("shape", rest_slow([(SHAPES[0],), (((2,), 5, 2),)]), ids=str)
@pytest.mark.parametrize("name", rest_slow(["exp", "log", "dist", "parallel_transport"]))
def test_derivatives_match_differences(x64, manifold, name, shape):
    s = point(0, shape)
    h, x = tangent(manifold, s, 1, 0.8), jnp.asarray(gaussian(2, *s.shape))

    def on_manifold(f):  # what is near the manifold is brought there first
        return lambda s, y: f(manifold.reorthonormalize(s), manifold.reorthonormalize(y))

    f, *arguments = {
        "exp": lambda: (compiled(manifold.exp), s, h),
        "log": lambda: (on_manifold(manifold.log), s, compiled(manifold.exp)(s, h)),
        "dist": lambda: (on_manifold(manifold.dist), s, compiled(manifold.exp)(s, h)),
        "parallel_transport": lambda: (lambda s, h: manifold.parallel_transport(s, h, x), s, h),
    }[name]()
    check_grads(jax.jit(f), arguments, order=1, modes=["rev"], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@every_manifold
@every_retraction
def test_derivatives_of_retractions_match_differences(x64, manifold, method):
    s = point(0, ((), 5, 2))
    h = tangent(manifold, s, 1, 0.8)
    check_grads(compiled(manifold.retract, method=method), (s, h), order=1, modes=["rev"], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@every_manifold
def test_gradient_of_squared_distance_is_minus_twice_the_log(x64, manifold):
    s = point(0, ((3,), 7, 3))
    y = compiled(manifold.exp)(s, tangent(manifold, s, 1, 1.1))
    euclidean = jax.jit(jax.grad(lambda s: jnp.sum(manifold.dist(s, y) ** 2)))(s)
    gradient = manifold.tangent_project(s, manifold.riemannian_gradient(s, euclidean))
    chex.assert_trees_all_close(gradient, -2 * compiled(manifold.log)(s, y), rtol=1e-7, atol=1e-7)


def calls(manifold, s, h, y):
    d = manifold.tangent_project(s, y)
    return {
        "tangent_project": d,
        "riemannian_gradient": manifold.riemannian_gradient(s, y),
        "inner": manifold.inner(s, h, d),
        "exp": manifold.exp(s, h, 0.9),
        "log": manifold.log(s, y),
        "parallel_transport": manifold.parallel_transport(s, h, d),
        **{method: manifold.retract(s, h, method) for method in manifold.RETRACTIONS if method != "exp"},
        "reorthonormalize": manifold.reorthonormalize(s),
    }


@pytest.mark.slow
@every_manifold
def test_batches_broadcasting_and_vmap_agree(x64, manifold):
    s = point(0, ((3,), 7, 3))
    h = tangent(manifold, s, 1, 0.9)
    y = compiled(manifold.exp)(s, tangent(manifold, s, 2, 1.1))
    run = jax.jit(lambda s, h, y: calls(manifold, s, h, y))

    def check(got, *arguments):
        want = run(*(jnp.broadcast_to(x, s.shape) for x in arguments))
        for name, value in got.items():
            chex.assert_trees_all_close(value, want[name], rtol=1e-7, atol=1e-12, custom_message=name)

    check(jax.jit(jax.vmap(run))(s, h, y), s, h, y)
    # One point and many vectors, and the reverse.
    near = jnp.stack([y[0], s[0], y[0]])
    few_h = jnp.stack([h[0], -h[0], 0.5 * h[0]])
    got = run(s[0], few_h, near)
    check({name: x for name, x in got.items() if x.ndim > 2 or name == "inner"}, s[0], few_h, near)
    check(run(jnp.stack([s[0]] * 3), h[0], y[0]), s[0], h[0], y[0])


@pytest.mark.slow
@every_manifold
def test_times_may_differ_along_the_leading_axes(x64, manifold):
    s = point(0, ((), 7, 3))
    h, times, exp = tangent(manifold, s, 1, 0.9), [0.5, -1.0], compiled(manifold.exp)
    chex.assert_trees_all_close(
        exp(s, h, jnp.array(times)), jnp.stack([exp(s, h, t) for t in times]), rtol=1e-7, atol=1e-14
    )


@pytest.mark.slow
@every_manifold
def test_single_precision_stays_near_double(x64, manifold):
    s = point(0, ((3,), 40, 5))
    h = tangent(manifold, s, 1, 1.0)
    y = compiled(manifold.exp)(s, tangent(manifold, s, 2, 1.0))
    run = jax.jit(lambda *args: calls(manifold, *args))
    want, got = run(s, h, y), run(*(x.astype(jnp.float32) for x in (s, h, y)))
    for name, value in got.items():
        assert value.dtype == jnp.float32
        chex.assert_trees_all_close(value, want[name], rtol=1e-7, atol=2e-6, custom_message=name)
    for name in (*manifold.RETRACTIONS, "reorthonormalize"):
        assert manifold.orthonormality_error(got[name]).max() < 1e-6


@every_manifold
def test_vectors_may_be_coarse_and_points_may_not(manifold):
    s = manifold.random_point(jax.random.key(0), 6, 2)
    h = manifold.tangent_project(s, jnp.ones((6, 2), jnp.bfloat16))
    assert h.dtype == jnp.float32
    assert manifold.retract(s, h.astype(jnp.bfloat16), "qr").dtype == jnp.float32
    coarse = s.astype(jnp.bfloat16)
    for call in (
        lambda: manifold.exp(coarse, h),
        lambda: manifold.log(s, coarse),
        lambda: manifold.dist(coarse, s),
        lambda: manifold.retract(coarse, h, "qr"),
        lambda: manifold.reorthonormalize(coarse),
        lambda: manifold.projection_transport(coarse, h),
    ):
        with pytest.raises(TypeError, match=r"^(s|y): .*bfloat16"):
            call()


@every_manifold
def test_results_have_the_dtype_of_the_first_argument(x64, manifold):
    s = point(0, ((), 6, 2))
    single = s.astype(jnp.float32)
    assert manifold.retract(single, tangent(manifold, s, 1), "qr").dtype == jnp.float32
    assert manifold.tangent_project(s, single).dtype == jnp.float64
    assert manifold.inner(single, single, s).dtype == jnp.float64


@every_manifold
def test_wrong_input_is_refused(manifold):
    s = manifold.random_point(jax.random.key(0), 6, 2)
    with pytest.raises(ValueError, match=r"method: .*'newton'"):
        manifold.retract(s, s, "newton")
    with pytest.raises(ValueError, match=r"method: .*'svd'"):
        manifold.reorthonormalize(s, "svd")
    with pytest.raises(ValueError, match="h: "):
        manifold.exp(s, s[:, :1])
    with pytest.raises(ValueError, match="s: "):
        manifold.tangent_project(s.T, s.T)
    with pytest.raises(TypeError, match=r"x: .*int32"):
        manifold.tangent_project(s, jnp.ones((6, 2), jnp.int32))
    with pytest.raises(ValueError, match="k: "):
        manifold.random_point(jax.random.key(0), 2, 3)
    with pytest.raises(ValueError, match="broadcast"):
        manifold.exp(jnp.stack([s, s]), jnp.stack([s, s, s]))


def long_steps(manifold, s, lengths):
    """Tangent vectors of some lengths: equal and unequal columns, mixed or not, a column of zeros, and rank one."""
    n, k = s.shape
    x, grades = gaussian(7, n, k), np.geomspace(1, 1e-6, k)
    turn = np.linalg.qr(gaussian(8, k, k))[0]
    kinds = [x, x * grades, (x * grades) @ turn, x * (np.arange(k) > 0), x[:, :1] * turn[0]]
    h = [np.asarray(manifold.tangent_project(s, jnp.asarray(x, s.dtype))) for x in kinds]
    return jnp.stack([length * (x / np.linalg.norm(x)) for x in h for length in lengths]).astype(s.dtype)


@every_manifold
@every_retraction
def test_long_steps_are_orthonormal_and_have_finite_derivatives(manifold, method):
    # In R^5 no tangent vector of four columns has full rank.
    s = jnp.asarray(point(0, ((), 5, 4)), jnp.float32)
    h = long_steps(manifold, s, np.float32([5.0, 1e2, 1e4, 1e8, 1e20]))

    @jax.jit
    def run(h):
        new, pull = jax.vjp(lambda h: manifold.retract(s, h, method), h)
        return new, pull(jnp.sin(new))[0]

    new, slopes = run(h)
    assert defect(new) < 2e-6
    assert jnp.all(jnp.isfinite(slopes))


@every_manifold
@qr_first
def test_long_steps_of_coarse_vectors_are_orthonormal(manifold, method):
    s = jnp.asarray(point(0, ((), 5, 4)), jnp.float32)
    h = long_steps(manifold, s, np.float32([1e8]))[0].astype(jnp.bfloat16)
    assert defect(manifold.retract(s, h, method)) < 2e-6


@pytest.mark.slow
@every_manifold
@every_retraction
def test_long_steps_are_those_of_the_formula_and_so_are_their_derivatives(x64, manifold, method):
    s = point(0, ((), 7, 3))
    h, d = tangent(manifold, s, 1, 8.0), tangent(manifold, s, 2, 1.0)
    step = compiled(manifold.retract, method=method)
    # Below 4, another way of computing it.
    near, far = step(s, h * (4 / 8 - 1e-9)), step(s, h * (4 / 8 + 1e-9))
    chex.assert_trees_all_close(near, far, rtol=1e-7, atol=1e-7)
    got = jax.jvp(lambda h: step(s, h), (h,), (d,))[1]
    chex.assert_trees_all_close(got, stencil(lambda e: step(s, h + e * d)), rtol=1e-7, atol=1e-8)


@pytest.mark.slow
def test_transport_along_long_geodesics_is_an_isometry_in_single_precision():
    s = jnp.asarray(point(0, ((), 12, 3)), jnp.float32)
    d = tangent(grassmann, s, 5).astype(jnp.float32)
    carried = grassmann.parallel_transport(s, long_steps(grassmann, s, np.float32([1e2])), d)
    # Angles of 1e2 are known to 1e-5.
    chex.assert_trees_all_close(jnp.linalg.norm(carried, axis=(1, 2)), jnp.linalg.norm(d), rtol=1e-4)
