import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from scipy.integrate import solve_ivp

from subspace_jax.manifolds import grassmann, stiefel

from ..linalg.cases import SHAPES, every_shape, few, seeds
from ..variants import rest_slow
from .cases import compiled, point, tangent


def rotation(s, h):
    """The skew ``n x n`` matrix whose exponential moves ``s`` along the geodesic."""
    s, h = np.asarray(s), np.asarray(h)
    half = h - s @ (s.mT @ h) / 2
    return half @ s.mT - s @ half.mT


def integrated(s, h, d):
    """Geodesic and transport by the differential equation of the metric, in the coordinates of the entries."""

    def connection(y, a, b):
        rest = np.eye(len(y)) - y @ y.T
        return ((a @ b.T + b @ a.T) @ y + y @ (a.T @ rest @ b + b.T @ rest @ a)) / 2

    def slope(_, flat):
        y, v, x = flat.reshape(3, *s.shape)
        return np.stack([v, -connection(y, v, v), -connection(y, v, x)]).ravel()

    start = np.stack([np.asarray(x) for x in (s, h, d)]).ravel()
    end = solve_ivp(slope, (0, 1), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return end.reshape(3, *s.shape)


@every_shape
@few
@given(seed=seeds)
def test_exp_is_the_exponential_of_a_rotation(x64, seed, shape):
    s = point(seed, shape)
    h = tangent(stiefel, s, seed + 1, 2.0)
    want = scipy.linalg.expm(rotation(s, h)) @ np.asarray(s)
    chex.assert_trees_all_close(compiled(stiefel.exp)(s, h), want, rtol=1e-7, atol=1e-13)


@every_shape
@few
@given(seed=seeds)
def test_cayley_is_the_cayley_transform_of_that_rotation(x64, seed, shape):
    s = point(seed, shape)
    h = tangent(stiefel, s, seed + 1, 2.0)
    w, eye = rotation(s, h) / 2, np.eye(shape[1])
    want = np.linalg.solve(eye - w, (eye + w) @ np.asarray(s))
    chex.assert_trees_all_close(compiled(stiefel.retract, method="cayley")(s, h), want, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("shape", rest_slow([(x,) for x in (*SHAPES[:3], ((), 7, 3), ((), 5, 4))]), ids=str)
def test_geodesic_and_transport_solve_their_differential_equations(x64, shape):
    s = point(0, shape)
    h, d = tangent(stiefel, s, 1, 1.7), tangent(stiefel, s, 2)
    y, velocity, carried = integrated(s, h, d) if s.ndim == 2 else np.stack(list(map(integrated, s, h, d)), 1)
    chex.assert_trees_all_close(compiled(stiefel.exp)(s, h), y, rtol=1e-7, atol=1e-11)
    chex.assert_trees_all_close(compiled(stiefel.parallel_transport)(s, h, h), velocity, rtol=1e-7, atol=1e-11)
    chex.assert_trees_all_close(compiled(stiefel.parallel_transport)(s, h, d), carried, rtol=1e-7, atol=1e-11)


def test_horizontal_geodesics_are_those_of_the_grassmann_manifold(x64):
    s = point(0, ((3,), 7, 3))
    h = tangent(grassmann, s, 1, 2.0)
    chex.assert_trees_all_close(compiled(stiefel.exp)(s, h), compiled(grassmann.exp)(s, h), rtol=1e-7, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "order"), [("qr", 2), ("polar", 2), ("cayley", 3)])
def test_order_of_retractions(x64, method, order):
    s = point(0, ((), 7, 3))
    h = tangent(stiefel, s, 1, 1.0)

    def gap(t):
        return np.linalg.norm(compiled(stiefel.retract, method=method)(s, t * h) - compiled(stiefel.exp)(s, t * h))

    chex.assert_trees_all_close(np.log10(gap(1e-2) / gap(1e-3)), order, rtol=1e-7, atol=0.05)


@pytest.mark.slow
def test_polar_is_of_third_order_along_horizontal_vectors(x64):
    s = point(0, ((), 7, 3))
    h = tangent(grassmann, s, 1, 1.0)
    polar, exp = compiled(stiefel.retract, method="polar"), compiled(stiefel.exp)
    gaps = [np.linalg.norm(polar(s, t * h) - exp(s, t * h)) for t in (1e-2, 1e-3)]
    chex.assert_trees_all_close(np.log10(gaps[0] / gaps[1]), 3, rtol=1e-7, atol=0.05)


@pytest.mark.slow
@every_shape
@few
@given(seed=seeds)
def test_log_reaches_its_documented_domain(x64, seed, shape):
    s = point(seed, shape)
    h = tangent(stiefel, s, seed + 1, 2.7)
    chex.assert_trees_all_close(compiled(stiefel.log)(s, compiled(stiefel.exp)(s, h)), h, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("size", "iterations"), rest_slow([(1.5, 7), (2.2, 11)]))
def test_log_takes_the_documented_iterations(x64, size, iterations):
    log = compiled(stiefel.log, num_iters=iterations)
    for seed in range(0, 20, 2):
        s = point(seed, SHAPES[0])
        h = tangent(stiefel, s, seed + 1, size)
        chex.assert_trees_all_close(log(s, compiled(stiefel.exp)(s, h)), h, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_log_in_single_precision():
    s = stiefel.random_point(jax.random.key(0), 30, 4, (5,))
    h = stiefel.tangent_project(s, jax.random.normal(jax.random.key(1), s.shape))
    h = 2.2 * h / jnp.sqrt(stiefel.inner(s, h, h))[..., None, None]
    chex.assert_trees_all_close(compiled(stiefel.log)(s, compiled(stiefel.exp)(s, h)), h, rtol=1e-7, atol=5e-6)


def test_frames_that_no_geodesic_joins_have_no_log(x64):
    s = point(0, ((), 4, 4))
    y = s * jnp.array([[1.0, 1.0, 1.0, -1.0]])
    assert np.isnan(compiled(stiefel.log)(s, y)).all()
    # The rest of a batch is not touched.
    dist = compiled(stiefel.dist)(s, jnp.stack([y, s]))
    assert np.isnan(dist[0])
    assert dist[1] < 1e-14


@every_shape
@few
@given(seed=seeds)
def test_geometry_commutes_with_rotations_of_space(x64, seed, shape):
    s, turn = point(seed, shape), point(seed + 2, ((), shape[1], shape[1]))
    h, d = tangent(stiefel, s, seed + 1, 1.2), tangent(stiefel, s, seed + 3)
    exp, carry = compiled(stiefel.exp), compiled(stiefel.parallel_transport)
    chex.assert_trees_all_close(exp(turn @ s, turn @ h), turn @ exp(s, h), rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(carry(turn @ s, turn @ h, turn @ d), turn @ carry(s, h, d), rtol=1e-7, atol=1e-13)


@pytest.mark.slow
@every_shape
@few
@given(seed=seeds)
def test_geometry_commutes_with_rotations_of_the_frame(x64, seed, shape):
    s, q = point(seed, shape), point(seed + 2, (shape[0], shape[2], shape[2]))
    h, d = tangent(stiefel, s, seed + 1, 1.2), tangent(stiefel, s, seed + 3)
    exp, carry = compiled(stiefel.exp), compiled(stiefel.parallel_transport)
    chex.assert_trees_all_close(exp(s @ q, h @ q), exp(s, h) @ q, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(carry(s @ q, h @ q, d @ q), carry(s, h, d) @ q, rtol=1e-7, atol=1e-13)


def test_norm_of_the_metric_counts_each_coordinate_once(x64):
    s = point(0, ((), 6, 3))
    skew = np.zeros((3, 3))
    skew[0, 1], skew[1, 0] = 1.0, -1.0
    chex.assert_trees_all_close(stiefel.inner(s, s @ skew, s @ skew), 1.0, rtol=1e-7, atol=1e-14)
    h = tangent(grassmann, s, 1)
    chex.assert_trees_all_close(stiefel.inner(s, h, h), jnp.sum(h * h), rtol=1e-14)


def test_iterations_are_checked():
    s = stiefel.random_point(jax.random.key(0), 4, 2)
    with pytest.raises(ValueError, match="num_iters"):
        stiefel.log(s, s, 0)
    with pytest.raises(ValueError, match="num_iters"):
        stiefel.dist(s, s, 0)
