"""Convolutions with any padding, dilation and groups."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train


@pytest.mark.parametrize(
    "how",
    [{"strides": 2, "padding": "SAME"}, {"strides": (1, 3), "padding": ((2, 0), 1), "dilation": (2, 1)}],
    ids=["same", "numbers"],
)
def test_groups_are_convolutions_beside_each_other_forwards_and_backwards(how, x64):
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

    for got, expected in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("space", "window", "how"),
    [
        ((9,), (3,), {"strides": 2, "padding": "SAME"}),
        ((7, 6), (3, 2), {"strides": (1, 3), "padding": ((2, 0), 1), "dilation": (2, 1)}),
        ((6, 6), (1, 1), {"strides": 2, "padding": 1}),
        ((4, 3, 3), (2, 2, 3), {"padding": "VALID"}),
        ((2, 2), (3, 3), {"padding": "VALID"}),
    ],
    ids=["line", "plane", "point", "room", "nothing"],
)
def test_a_wide_convolution_is_a_product_forwards_and_backwards(space, window, how, x64, monkeypatch):
    draw = np.random.default_rng(0).normal
    x, w = jnp.asarray(draw(size=(2, *space, 64))), jnp.asarray(draw(size=(*window, 64, 5)))

    def run():
        @jax.jit
        def both(x, w):
            y, back = jax.vjp(lambda x, w: nn.conv(x, w, **how), x, w)
            return y, *back(jnp.sin(y))

        lowered = both.lower(x, w).as_text()
        return both(x, w), "stablehlo.convolution" in lowered

    got, convolves = run()
    assert not convolves
    monkeypatch.setattr(importlib.import_module("subspace_jax.nn.layers.conv"), "_WIDE", 65)
    expected, convolves = run()
    assert convolves
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_a_wide_convolution_of_bfloat16_stays_one():
    x, w = jnp.ones((1, 4, 4, 64), jnp.bfloat16), jnp.ones((3, 3, 64, 5), jnp.bfloat16)
    assert "stablehlo.convolution" in jax.jit(nn.conv).lower(x, w).as_text()


def test_convolutions_check_what_they_are_given():
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
    with pytest.raises(ValueError, match="one to three axes"):
        nn.conv(jnp.ones((1, 6)), w)
    with pytest.raises(ValueError, match="kernel of 3 axes"):
        nn.conv(jnp.ones((1, 4, 6)), w)
    with pytest.raises(TypeError, match="floating point"):
        nn.conv(jnp.ones((1, 4, 4, 6), jnp.int32), w)


def test_the_gradient_of_a_grouped_kernel_is_the_same_over_a_mesh():
    """By itself the compiler adds up the copies that a mesh has of a batch, and returns a multiple."""
    draw = np.random.default_rng(0).normal
    x, w = jnp.asarray(draw(size=(4, 5, 4)), jnp.float32), jnp.asarray(draw(size=(3, 2, 6)), jnp.float32)
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    grad = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(nn.conv(x, w, groups=2)))))
    expected = grad(w, x)
    placed = jax.device_put(w, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data")))
    # Float32 sums of twenty products.
    np.testing.assert_allclose(grad(*placed), expected, rtol=1e-4, atol=1e-5)
