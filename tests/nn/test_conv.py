"""Convolutions with any padding, dilation and groups."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train


@pytest.mark.parametrize(
    "how",
    [{"strides": 2, "padding": "SAME"}, {"strides": (1, 3), "padding": ((2, 0), 1), "dilation": (2, 1)}],
    ids=["same", "numbers"],
)
def test_grouped_conv_equals_one_conv_for_each_group(how, x64):
    draw = np.random.default_rng(0).normal
    x, w = jnp.asarray(draw(size=(2, 7, 6, 6))), jnp.asarray(draw(size=(3, 2, 2, 9)))

    def together(x, w):
        return nn.conv(x, w, groups=3, **how)

    def apart(x, w):
        parts = zip(jnp.split(x, 3, -1), jnp.split(w, 3, -1), strict=True)
        return jnp.concatenate([nn.conv(*part, **how) for part in parts], -1)

    @jax.jit
    def both(x, w):
        runs = [jax.vjp(f, x, w) for f in (together, apart)]
        return [(y, *back(jnp.sin(y))) for y, back in runs]

    chex.assert_trees_all_close(*both(x, w), rtol=1e-12, atol=1e-12)


def test_conv_refuses_wrong_shapes_and_options():
    x, w = jnp.ones((1, 4, 4, 6)), jnp.ones((3, 3, 3, 4))
    assert nn.conv(x, w, groups=2, strides=(1, 2), padding=((1, 0), 1)).shape == (1, 3, 2, 4)
    for message, arguments in {
        "3 in each of 1 groups": {},
        "strides: expected": {"groups": 2, "strides": (1,)},
        "padding: expected 'SAME'": {"groups": 2, "padding": "same"},
        "padding: expected a number": {"groups": 2, "padding": (1, 1, 1)},
        "dilation: expected": {"groups": 2, "dilation": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            nn.conv(x, w, **arguments)
    with pytest.raises(ValueError, match="one to three spatial axes"):
        nn.conv(jnp.ones((1, 6)), w)
    with pytest.raises(ValueError, match="kernel of 3 axes"):
        nn.conv(jnp.ones((1, 4, 6)), w)
    with pytest.raises(TypeError, match="floating-point x"):
        nn.conv(jnp.ones((1, 4, 4, 6), jnp.int32), w)


@pytest.mark.eight_devices
def test_grouped_conv_has_the_same_gradient_on_a_mesh():
    draw = np.random.default_rng(0).normal
    x, w = jnp.asarray(draw(size=(4, 5, 4)), jnp.float32), jnp.asarray(draw(size=(3, 2, 6)), jnp.float32)
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    grad = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(nn.conv(x, w, groups=2)))))
    placed = jax.device_put(w, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data")))
    # Float32 sums of twenty products.
    chex.assert_trees_all_close(grad(*placed), grad(w, x), rtol=1e-4, atol=1e-5)


@pytest.mark.eight_devices
def test_conv_takes_a_batch_sharded_over_explicit_axes():
    draw = np.random.default_rng(0).normal
    x, kernel = jnp.asarray(draw(size=(4, 9, 9, 8)), jnp.float32), jnp.asarray(draw(size=(3, 3, 8, 16)), jnp.float32)

    @jax.jit
    def both(x, kernel):
        y, back = jax.vjp(nn.conv, x, kernel)
        return y, *back(y)

    mesh = train.make_mesh(data=2, fsdp=2, tensor=2, axis_type=AxisType.Explicit)
    placed = [jax.device_put(z, NamedSharding(mesh, spec)) for z, spec in ((x, P("data")), (kernel, P()))]
    for actual, expected in zip(both(*placed), both(x, kernel), strict=True):
        # Float32 sums of hundreds of products, in another order.
        scale = np.abs(expected).max()
        chex.assert_trees_all_close(actual / scale, expected / scale, rtol=0, atol=1e-5)
