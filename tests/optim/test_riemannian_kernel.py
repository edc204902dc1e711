"""Riemannian SGD and Adam by the fused step of bases: precision, several devices, and the kernel on TPUs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import optim
from subspace_jax.manifolds import grassmann

from ..variants import rest_slow


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P("data", "model"), P("data")], ids=["classes and n", "classes"])
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
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 16])
def test_steps_stay_orthonormal(k):
    s = grassmann.random_point(jax.random.key(0), 1024, k, (2,))
    tx = optim.riemannian_sgd(0.1)
    state = tx.init(s)
    update = jax.jit(tx.update)
    for i in range(10):
        updates, state = update(jnp.asarray(gaussian(i, *s.shape) / 32), state, s)
        s = optax.apply_updates(s, updates)
        exact = np.asarray(s, np.float64)
        assert np.max(np.linalg.norm(exact.mT @ exact - np.eye(k), axis=(1, 2))) < 6e-7


@pytest.mark.slow
@pytest.mark.parametrize("retraction", ["exp", "qr"])
@pytest.mark.parametrize("transport", ["euclidean", "parallel"])
def test_steps_of_many_turns_stay_on_the_manifold(retraction, transport):
    s = grassmann.random_point(jax.random.key(0), 64, 4, (2,))
    for length in (10.0, 1e3, 1e5):
        tx = optim.riemannian_sgd(length, retraction=retraction, transport=transport)
        updates, state = tx.update(jnp.asarray(gaussian(1, *s.shape)), tx.init(s), s)
        assert np.max(grassmann.orthonormality_error(s + updates)) < max(1e-5, 1e-7 * length)
        assert np.all(np.isfinite(state.momentum))


@pytest.mark.slow
def test_transforms_take_the_kernel_on_tpus(compile_for_tpu, topology):
    shape = ((1000, 2048, 8), jnp.float32)
    for tx in (optim.riemannian_sgd(0.1), optim.riemannian_adam(0.1)):

        def update(s, g, m, tx=tx):
            state = jax.tree.map(lambda x: x, tx.init(s))._replace(momentum=m)
            return tx.update(g, state, s)[0]

        assert "tpu_custom_call" in compile_for_tpu(update, shape, shape, shape, topology=topology).as_text()


@pytest.mark.slow
def test_transforms_take_the_kernel_on_many_tpus_with_explicit_axes(tpu_mesh):
    mesh = tpu_mesh({"data": 16})
    arg = jax.ShapeDtypeStruct((1600, 2048, 8), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    for tx in (optim.riemannian_sgd(0.1), optim.riemannian_adam(0.1)):

        def update(s, g, m, tx=tx):
            return tx.update(g, tx.init(s)._replace(momentum=m), s)[0]

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            text = jax.jit(update).lower(arg, arg, arg).compile().as_text()
        assert "tpu_custom_call" in text
        assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all"))


@pytest.mark.eight_devices
@pytest.mark.parametrize("make", rest_slow([optim.riemannian_sgd, optim.riemannian_adam]), ids=["sgd", "adam"])
@pytest.mark.parametrize(
    "spec", rest_slow([P("data", "model", None), P("data"), P(None, "model")]), ids=["both", "classes", "n"]
)
def test_transforms_that_are_told_shardings_step_as_on_one_device(make, spec):
    s = grassmann.random_point(jax.random.key(0), 64, 4, (8,))
    grads = jnp.asarray(gaussian(1, *s.shape) / 8)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, spec)
    # Others are beside them, and of what a transform does not see it is told as well.
    tree, tx = {"a": {"bases": s}, "b": {"kernel": s[0]}}, optim.with_geometry(optax.sgd(0.1), make(0.1))
    slopes, places = {"a": {"bases": grads}, "b": {"kernel": s[0]}}, {"a": {"bases": split}, "b": {"kernel": whole}}
    want = jax.jit(tx.update)(slopes, tx.init(tree), tree)

    def update(*args):
        return tx.update(*args, shardings=places)

    tree, slopes = jax.device_put((tree, slopes), (places, places))
    got = jax.jit(update)(slopes, tx.init(tree), tree)
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)
    assert "shard_map" in str(jax.make_jaxpr(update)(slopes, tx.init(tree), tree))


@pytest.mark.slow
def test_transforms_that_are_told_shardings_take_the_kernel_on_many_tpus_in_place(tpu_mesh):
    mesh = tpu_mesh({"data": 8, "fsdp": 1}, AxisType.Auto)
    sharding = NamedSharding(mesh, P("data", "fsdp"))
    arg = jax.ShapeDtypeStruct((1600, 2048, 8), jnp.float32, sharding=sharding)
    tx = optim.riemannian_sgd(0.1)

    def update(s, momentum):
        state = optim.RiemannianSGDState(jnp.ones((), jnp.int32), momentum)
        updates, state = tx.update(jnp.sin(s), state, s, shardings=sharding)
        return optax.apply_updates(s, updates), state.momentum

    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(arg, arg).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert not any(word in compiled.as_text() for word in ("all-reduce", "all-gather", "all-to-all"))
    # The gradient, in whose place the difference is written.
    share = 4 * 200 * 2048 * 8
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * share
