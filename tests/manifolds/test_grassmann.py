import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_jax.manifolds import grassmann

from ..linalg.cases import every_shape, few, seeds
from .cases import compiled, point, projector, tangent


@pytest.mark.parametrize("name", ["exp_H", "exp_tH", "transport_D", "transport_H", "log_expH", "dist", "angles"])
def test_geometry_matches_the_oracle(x64, golden, name):
    g = {key: jnp.asarray(value) for key, value in golden("gcr/oracle_geometry").items()}
    s, h, d, t = g["S"], g["H"], g["D"], g["t"]
    got, want = {
        "exp_H": lambda: (grassmann.exp(s, h), g["exp_H"]),
        "exp_tH": lambda: (grassmann.exp(s, h, t), g["exp_tH"]),
        "transport_D": lambda: (grassmann.parallel_transport(s, h, d, t), g["transport_D"]),
        "transport_H": lambda: (grassmann.parallel_transport(s, h, h, t), g["transport_H"]),
        "log_expH": lambda: (grassmann.log(s, g["exp_H"]), g["log_expH"]),
        "dist": lambda: (grassmann.dist(s, g["exp_H"]), g["dist"]),
        "angles": lambda: (grassmann.principal_angles(s, g["exp_H"]), g["principal_angles"]),
    }[name]()
    chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["qr", "polar", "cayley"])
def test_retractions_match_the_oracle(x64, golden, method):
    g = golden("gcr/oracle_geometry")
    got = grassmann.retract(jnp.asarray(g["S"]), jnp.asarray(g["H"]), method)
    chex.assert_trees_all_close(got, g[f"retract_{method}"], rtol=1e-10, atol=1e-12)


@every_shape
@few
@given(seed=seeds, size=st.sampled_from([0.5, 2.5, 9.0]))
def test_exp_matches_the_singular_value_form(x64, seed, shape, size):
    s = point(seed, shape)
    h = tangent(grassmann, s, seed + 1, size)
    u, angles, vt = np.linalg.svd(h, full_matrices=False)
    angles = angles[..., None, :]
    want = (s @ vt.mT * np.cos(angles) + u * np.sin(angles)) @ vt
    chex.assert_trees_all_close(compiled(grassmann.exp)(s, h), want, rtol=1e-7, atol=1e-14 * (1 + size))


@pytest.mark.slow
@every_shape
@few
@given(seed=seeds)
def test_maps_do_not_depend_on_the_basis(x64, seed, shape):
    s, q = point(seed, shape), point(seed + 2, (shape[0], shape[2], shape[2]))
    h, d = tangent(grassmann, s, seed + 1, 1.2), tangent(grassmann, s, seed + 3)
    exp, carry, log = (compiled(f) for f in (grassmann.exp, grassmann.parallel_transport, grassmann.log))
    y = exp(s, h)
    chex.assert_trees_all_close(exp(s @ q, h @ q), y @ q, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(carry(s @ q, h @ q, d @ q), carry(s, h, d) @ q, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(log(s @ q, y), log(s, y) @ q, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(log(s, y @ q), log(s, y), rtol=1e-7, atol=1e-13)
    dist = compiled(grassmann.dist)
    chex.assert_trees_all_close(dist(s @ q, y), dist(s, y), rtol=1e-7, atol=1e-14)
    for method in grassmann.RETRACTIONS:
        step = compiled(grassmann.retract, method=method)
        chex.assert_trees_all_close(projector(step(s @ q, h @ q)), projector(step(s, h)), rtol=1e-7, atol=1e-13)
        if method != "qr":
            chex.assert_trees_all_close(step(s @ q, h @ q), step(s, h) @ q, rtol=1e-7, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "as_bases"), [("qr", 2), ("polar", 3), ("cayley", 3)])
def test_order_of_retractions(x64, method, as_bases):
    s = point(0, ((), 9, 3))
    h = tangent(grassmann, s, 1, 1.0)

    def gap(t, show):
        got, want = compiled(grassmann.retract, method=method)(s, t * h), compiled(grassmann.exp)(s, t * h)
        return np.linalg.norm(show(got) - show(want))

    for show, order in ((projector, 3), (np.asarray, as_bases)):
        chex.assert_trees_all_close(np.log10(gap(1e-2, show) / gap(1e-3, show)), order, rtol=1e-7, atol=0.05)


@few
@given(seeds)
def test_qr_and_polar_retractions_reach_the_span_of_the_sum(x64, seed):
    s = point(seed, ((3,), 7, 3))
    h = tangent(grassmann, s, seed + 1, 2.0)
    want = projector(np.linalg.qr(s + h)[0])
    for method in ("qr", "polar"):
        chex.assert_trees_all_close(projector(grassmann.retract(s, h, method)), want, rtol=1e-7, atol=1e-13)


@pytest.mark.slow
def test_the_whole_space_has_no_tangent_vectors(x64):
    s, x = point(0, ((), 4, 4)), point(1, ((), 4, 4))
    chex.assert_trees_all_close(grassmann.tangent_project(s, x), 0, rtol=1e-7, atol=1e-14)
    chex.assert_trees_all_close(grassmann.geodesic(s, x), s, rtol=1e-7, atol=1e-14)
    chex.assert_trees_all_close(grassmann.dist(s, x), 0, rtol=1e-7, atol=1e-14)
    chex.assert_trees_all_close(grassmann.log(s, x), 0, rtol=1e-7, atol=1e-14)


@pytest.mark.slow
def test_distance_has_a_gradient_where_principal_angles_vanish_or_coincide(x64):
    s = point(0, ((), 5, 4))  # in R^5 three of four angles are always 0
    h = tangent(grassmann, s, 1, 0.8)
    slope = jax.jit(jax.grad(lambda t, s, h: grassmann.dist(s, grassmann.exp(s, h, t))))
    chex.assert_trees_all_close(slope(0.5, s, h), 0.8, rtol=1e-12)
    frame = point(2, ((), 6, 6))
    s, h = frame[:, :3], 0.4 * frame[:, 3:]  # three equal angles
    chex.assert_trees_all_close(slope(0.5, s, h), 0.4 * np.sqrt(3), rtol=1e-12)


def test_distance_stays_accurate_when_tiny(x64):
    s = point(0, ((), 9, 3))
    h = tangent(grassmann, s, 1, 1e-9)
    chex.assert_trees_all_close(grassmann.dist(s, grassmann.exp(s, h)), 1e-9, rtol=1e-6)


@pytest.mark.slow
def test_align_finds_the_rotation_of_the_basis(x64):
    s, q = point(0, ((3,), 7, 3)), point(1, ((3,), 3, 3))
    h = tangent(grassmann, s, 2, 1.0)
    chex.assert_trees_all_close(grassmann.align(s, grassmann.exp(s, h) @ q), q, rtol=1e-7, atol=1e-13)
    # A direction that has turned by a right angle has no image.
    assert np.isnan(grassmann.align(s[0, :, :2], s[0, :, 1:])).all()


@pytest.mark.slow
def test_steps_in_single_precision_add_no_drift():
    s = grassmann.random_point(jax.random.key(0), 64, 8, (20,))
    h = grassmann.tangent_project(s, jax.random.normal(jax.random.key(1), s.shape))
    for size in (1e-2, 1e-1, 1.0):
        step = size * h / jnp.linalg.norm(h, axis=(-2, -1), keepdims=True)
        for method in grassmann.RETRACTIONS:
            new = compiled(grassmann.retract, method=method)(s, step)
            assert np.max(grassmann.orthonormality_error(new)) < 1e-6


def log_in_float64(s, y):
    """Logarithm by tangents of the angles, of the subspaces that float32 bases span."""
    s, y = (np.linalg.qr(np.asarray(x, np.float64))[0] * np.sign(np.diag(np.linalg.qr(x)[1])) for x in (s, y))
    overlap = s.T @ y
    u, tangents, vt = np.linalg.svd((y - s @ overlap) @ np.linalg.inv(overlap), full_matrices=False)
    return (u * np.arctan(tangents)) @ vt


@pytest.mark.parametrize(
    "shape", [(2048, 8), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((10, 8), (4, 4), (6, 1)))]
)
def test_log_and_dist_in_single_precision_are_those_in_double_between_random_points(shape):
    # Angles near a right angle in the first, angles of 0 in the second, where n < 2 k.
    s, y = (grassmann.random_point(jax.random.key(i), *shape, (8,)) for i in (0, 1))
    want = np.stack([log_in_float64(*pair) for pair in zip(np.asarray(s), np.asarray(y), strict=True)])

    @jax.jit
    def run(s, y):
        dist, pull = jax.vjp(lambda y: grassmann.dist(s, y), y)
        return grassmann.log(s, y), dist, pull(dist)[0]

    log, dist, slope = run(s, y)
    chex.assert_trees_all_close(log, want, rtol=1e-7, atol=2e-6)
    length = np.linalg.norm(want, axis=(1, 2))
    chex.assert_trees_all_close(dist, length, rtol=2e-6, atol=1e-6)
    back = np.stack([log_in_float64(*pair) for pair in zip(np.asarray(y), np.asarray(s), strict=True)])
    chex.assert_trees_all_close(slope, -back, rtol=1e-7, atol=1e-5)


@pytest.mark.slow
def test_log_of_tiny_angles_loses_no_more_than_the_rounding_of_bases():
    s = grassmann.random_point(jax.random.key(0), 64, 4)
    for size in (0.0, 1e-6, 1e-4):
        h = size * grassmann.tangent_project(s, jax.random.normal(jax.random.key(1), s.shape))
        y = compiled(grassmann.exp)(s, h)
        chex.assert_trees_all_close(compiled(grassmann.log)(s, y), log_in_float64(s, y), rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_log_at_the_cut_locus_is_one_of_two_and_its_derivative_is_finite():
    s, y = jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]  # angles of 0 and of a right angle
    h = grassmann.log(s, y)
    chex.assert_trees_all_close(jnp.linalg.norm(h), jnp.pi / 2, rtol=1e-6)
    chex.assert_trees_all_close(projector(grassmann.exp(s, h)), projector(y), rtol=1e-7, atol=1e-6)
    assert jnp.all(jnp.isfinite(jax.grad(lambda y: jnp.sum(jnp.sin(grassmann.log(s, y))))(y)))
