"""Contrastive losses: what they are for one device, and that many give the same."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import losses

SCALE, BIAS = 1.3, -2.0


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((16, 5), np.float32)) for _ in range(2))


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)


def test_clip_is_the_mean_of_both_cross_entropies(pairs):
    logits = np.exp(SCALE) * unit(pairs[0]) @ unit(pairs[1]).T

    def entropy(logits):
        return np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)

    got = losses.clip_loss(*pairs, jnp.float32(SCALE))
    chex.assert_trees_all_close(got, (entropy(logits) + entropy(logits.T)) / 2, rtol=1e-5)


def test_siglip_sums_the_logistic_losses_of_all_pairs(pairs):
    logits = np.exp(SCALE) * unit(pairs[0]) @ unit(pairs[1]).T + BIAS
    signs = 2 * np.eye(16) - 1
    wanted = np.log1p(np.exp(-signs * logits)).sum(axis=1)
    got = losses.siglip_loss(*pairs, jnp.float32(SCALE), jnp.float32(BIAS))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)


@pytest.mark.eight_devices
@pytest.mark.parametrize("loss", [losses.clip_loss, losses.siglip_loss])
def test_eight_devices_give_the_loss_and_the_gradients_of_one(loss, pairs):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    numbers = (jnp.float32(SCALE), jnp.float32(BIAS))[: 1 if loss is losses.clip_loss else 2]
    local = functools.partial(loss, axis_name="data")
    split = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data"), *[P()] * len(numbers)), out_specs=P("data"))

    def both(*arguments):
        return [jax.value_and_grad(lambda *a, f=f: jnp.mean(f(*a)), argnums=range(len(a)))(*a) for f, a in arguments]

    run = jax.jit(lambda *a: both((loss, a), (split, a)))
    one, eight = run(*pairs, *numbers)
    # Sums over the batch in another order.
    chex.assert_trees_all_close(eight, one, rtol=1e-4, atol=1e-7)


def test_no_device_holds_all_scores():
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    specs = (P("data"), P("data"), P(), P())
    split = jax.shard_map(
        functools.partial(losses.siglip_loss, axis_name="data"), mesh=mesh, in_specs=specs, out_specs=P("data")
    )
    x = jax.ShapeDtypeStruct((64, 4), jnp.float32)
    s = jax.ShapeDtypeStruct((), jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda *a: jnp.mean(split(*a))))(x, x, s, s))
    # A block of 8 by 8 scores, and never a row of 64.
    assert "f32[8,8]" in text
    assert "8,64]" not in text
    assert "f32[7,8,8]" not in text


def test_pairs_that_do_not_match_are_refused(pairs):
    with pytest.raises(ValueError, match="clip_loss: expected image and text"):
        losses.clip_loss(pairs[0], pairs[1][:3], jnp.float32(0))
    with pytest.raises(ValueError, match="siglip_loss: expected image and text"):
        losses.siglip_loss(pairs[0][0], pairs[1][0], jnp.float32(0), jnp.float32(0))


@pytest.mark.slow
def test_features_of_zeros_and_of_any_size_give_finite_losses_and_gradients():
    size = jnp.asarray([0.0, 1e-20, 1.0, 1e20], jnp.float32)[:, None]
    image = size * jax.random.normal(jax.random.key(0), (4, 3))
    text = jax.random.normal(jax.random.key(1), (4, 3))
    for loss in (losses.clip_loss, lambda *args: losses.siglip_loss(*args, jnp.zeros(()))):
        value, grads = jax.value_and_grad(lambda *args, loss=loss: jnp.sum(loss(*args)), (0, 1))(
            image, text, jnp.ones(())
        )
        assert all(jnp.all(jnp.isfinite(x)) for x in (value, *grads))
        unit = loss(jnp.where(size > 0, image / jnp.where(size > 0, size, 1), 0), text, jnp.ones(()))
        chex.assert_trees_all_close(value, jnp.sum(unit), rtol=1e-6)
