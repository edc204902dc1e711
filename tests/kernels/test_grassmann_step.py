import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg, optim
from subspace_jax.kernels.grassmann_step.gram import defect, tall_gram
from subspace_jax.manifolds import grassmann


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("lead", "n", "k"),
    [
        ((3,), 512, 8),
        ((2, 2), 1024, 1),
        ((), 1024, 16),
        ((3,), 4096, 3),
        # Blocks that don't come in groups of 32, twice over; what the sums leave to a product.
        ((2,), 32 * 3001, 2),
        ((3,), 520, 8),
        ((3,), 512, 9),
        ((3,), 20, 8),
        ((0,), 512, 8),
    ],
)
def test_gram_matches_float64(lead, n, k):
    x, y = gaussian(0, *lead, n, k), gaussian(1, *lead, n, k)
    want = np.asarray(x, np.float64).mT @ np.asarray(y, np.float64)
    got = jax.jit(tall_gram)(x, y)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.sqrt(n))


@pytest.mark.parametrize(("n", "k"), [(2048, 8), (64, 4), (256, 16)])
def test_defect_is_known_to_a_rounding_of_the_identity(n, k):
    s = grassmann.random_point(jax.random.key(0), n, k, (3,))
    exact = np.asarray(s, np.float64)
    # A plain sum of 2048 squares errs by five times as much.
    np.testing.assert_allclose(jax.jit(defect)(s), exact.mT @ exact - np.eye(k), rtol=0, atol=1.2e-7)


def test_gram_under_vmap_and_grad():
    x, y = jnp.asarray(gaussian(0, 3, 512, 4)), jnp.asarray(gaussian(1, 3, 512, 4))
    np.testing.assert_allclose(jax.vmap(tall_gram)(x, y), tall_gram(x, y), rtol=1e-5, atol=1e-4)
    grads = jax.grad(lambda x: jnp.sum(jnp.square(tall_gram(x, y))))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.square(linalg.gram(x, y))))(x)
    np.testing.assert_allclose(grads, want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P("data", "model")], ids=["classes", "classes and n"])
def test_a_step_over_devices_is_that_of_one(mode, spec):
    s = grassmann.random_point(jax.random.key(0), 512, 4, (8,))
    grads = jnp.asarray(gaussian(1, *s.shape))
    tx = optim.riemannian_sgd(0.1)
    step = jax.jit(lambda s, state, grads: tx.update(grads, state, s))
    want, _ = step(s, tx.init(s), grads)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(mode, mode))
    with jax.set_mesh(mesh):
        spread, grads = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (s, grads))
        got, _ = step(spread, tx.init(spread), grads)
    assert got.sharding.is_equivalent_to(spread.sharding, 3)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [4, 16])
def test_steps_with_sums_of_rows_stay_orthonormal(k):
    s = grassmann.random_point(jax.random.key(0), 1024, k, (2,))
    tx = optim.riemannian_sgd(0.1)
    state = tx.init(s)
    update = jax.jit(tx.update)
    for i in range(10):
        updates, state = update(jnp.asarray(gaussian(i, *s.shape) / 32), state, s)
        s = optax.apply_updates(s, updates)
        exact = np.asarray(s, np.float64)
        assert np.max(np.linalg.norm(exact.mT @ exact - np.eye(k), axis=(1, 2))) < 6e-7


@pytest.mark.parametrize("retraction", ["exp", "qr"])
@pytest.mark.parametrize("transport", ["euclidean", "parallel"])
def test_steps_of_many_turns_stay_on_the_manifold(retraction, transport):
    s = grassmann.random_point(jax.random.key(0), 64, 4, (2,))
    for length in (10.0, 1e3, 1e5):
        tx = optim.riemannian_sgd(length, retraction=retraction, transport=transport)
        updates, state = tx.update(jnp.asarray(gaussian(1, *s.shape)), tx.init(s), s)
        assert np.max(grassmann.orthonormality_error(s + updates)) < max(1e-5, 1e-7 * length)
        assert np.all(np.isfinite(state.momentum))
