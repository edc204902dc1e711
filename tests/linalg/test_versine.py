import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from subspace_jax import linalg

from .cases import few, gaussian, seeds

versine_sinc = jax.jit(linalg.versine_sinc_sqrt)


def matrices(seed, lead, angles):
    """Symmetric matrices whose eigenvalues are the squares of the angles, with random eigenvectors."""
    q = np.linalg.qr(gaussian(seed, *lead, len(angles), len(angles)))[0]
    m = (q * np.square(angles)) @ q.mT
    return (m + m.mT) / 2


def reference(m):
    values, vectors = np.linalg.eigh(np.asarray(m, np.float64))
    root = np.sqrt(np.maximum(values, 0))
    return [(vectors * f[..., None, :]) @ vectors.mT for f in (1 - np.cos(root), np.sinc(root / np.pi))]


def assert_close(got, want, atol):
    chex.assert_trees_all_close(tuple(got), tuple(want), rtol=0, atol=atol)


@few
@given(
    seeds,
    st.sampled_from([(0.0, 1e-3, 0.9), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1e-8, 2.0, 3.2), (0.1, 6.0, 20.0), (60.0,)]),
    st.sampled_from([np.float32, np.float64]),
)
def test_matches_eigenvalues_whatever_the_angles(x64, seed, angles, dtype):
    m = matrices(seed, (2,), angles).astype(dtype)
    got = versine_sinc(jnp.asarray(m))
    assert all(x.dtype == dtype for x in got)
    assert_close(got, reference(m), 4 * np.finfo(dtype).eps * (1 + max(angles) ** 2))


def test_zero_gives_zero_and_the_identity():
    versine, sinc = linalg.versine_sinc_sqrt(jnp.zeros((2, 3, 3)))
    chex.assert_trees_all_equal(versine, np.zeros((2, 3, 3), np.float32))
    chex.assert_trees_all_equal(sinc, np.broadcast_to(np.eye(3, dtype=np.float32), (2, 3, 3)))


def test_small_angles_keep_their_precision():
    for m in (1e-4, 1e-12):
        versine, sinc = linalg.versine_sinc_sqrt(jnp.full((1, 1), m))
        chex.assert_trees_all_close([versine[0, 0], sinc[0, 0]], [m / 2 - m**2 / 24, 1 - m / 6], rtol=2e-7)


def test_eigenvalues_that_are_negative_by_rounding_do_no_harm():
    m = matrices(0, (), (0.0, 0.5, 2.0)).astype(np.float32) - 1e-7 * np.eye(3, dtype=np.float32)
    assert_close(linalg.versine_sinc_sqrt(jnp.asarray(m)), reference(m), 1e-6)


@pytest.mark.slow
def test_matrices_of_a_batch_do_not_touch_each_other():
    small, large = (matrices(i, (), angles).astype(np.float32) for i, angles in enumerate([(0.1, 0.2), (7.0, 30.0)]))
    together = linalg.versine_sinc_sqrt(jnp.stack([small, large]))
    for i, m in enumerate((small, large)):
        assert_close([x[i] for x in together], linalg.versine_sinc_sqrt(jnp.asarray(m)), 1e-6)


@pytest.mark.parametrize("angle", [100.0, 1e6, 1e15])
def test_angles_beyond_the_doublings_stay_angles(angle):
    m = np.diag(np.square([angle, 1.0]))
    versine, sinc = linalg.versine_sinc_sqrt(jnp.asarray(m, jnp.float32))
    chex.assert_trees_all_close(versine[1, 1], 1 - np.cos(1), rtol=1e-7, atol=1e-6)
    assert np.all(np.abs(1 - versine) <= 1 + 1e-5)
    assert np.all(np.abs(sinc) <= 1 + 1e-5)


def test_what_is_not_finite_ends():
    assert not np.all(np.isfinite(linalg.versine_sinc_sqrt(jnp.full((2, 2), jnp.nan))[0]))


def test_empty_batch():
    assert [x.shape for x in linalg.versine_sinc_sqrt(jnp.zeros((0, 3, 3)))] == [(0, 3, 3)] * 2


@pytest.mark.slow
def test_jit_and_vmap_agree():
    m = jnp.asarray(np.stack([matrices(i, (), (0.1, 0.5 * 3**i)) for i in range(4)]), jnp.float32)
    want = linalg.versine_sinc_sqrt(m)
    assert_close(jax.jit(linalg.versine_sinc_sqrt)(m), want, 1e-6)
    assert_close(jax.jit(jax.vmap(linalg.versine_sinc_sqrt))(m), want, 1e-6)


@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_batches_spread_over_devices_give_the_same(mode):
    m = jnp.asarray(np.stack([matrices(i, (), (0.1, 0.5 * i, 1.0)) for i in range(8)]), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(mode,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(m, NamedSharding(mesh, P("data")))
        got = jax.jit(linalg.versine_sinc_sqrt)(spread)
    assert all(x.sharding.is_equivalent_to(spread.sharding, 3) for x in got)
    assert_close(got, reference(m), 1e-5)


def test_derivatives_are_those_of_the_eigenvalues(x64):
    m = jnp.asarray(matrices(0, (2,), (0.3, 1.0, 1.0)))
    check_grads(jax.jit(lambda x: linalg.versine_sinc_sqrt(x + x.mT)), (m / 2,), order=1, rtol=1e-5, atol=1e-6)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="square"):
        linalg.versine_sinc_sqrt(jnp.ones((3, 2)))
    with pytest.raises(TypeError, match="bfloat16"):
        linalg.versine_sinc_sqrt(jnp.ones((2, 2), jnp.bfloat16))


def test_where_norms_are_bounded_the_values_are_the_same_and_no_eigenvalues_are_asked_for():
    m = jnp.asarray(matrices(0, (2,), (0.1, 6.0, 20.0)).astype(np.float32))
    for got, want in zip(linalg.versine_sinc_sqrt(m, True), linalg.versine_sinc_sqrt(m), strict=True):
        chex.assert_trees_all_equal(got, want)
    assert "eigh" not in str(jax.make_jaxpr(lambda m: linalg.versine_sinc_sqrt(m, True))(m))
