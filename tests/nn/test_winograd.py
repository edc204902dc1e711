"""Convolutions in tiles of 2 x 2 outputs."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train
from subspace_jax.nn.layers.winograd import convolved_3x3


def _reference(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.jit
def _both(x, kernel):
    runs = [jax.vjp(f, x, kernel) for f in (convolved_3x3, _reference)]
    return [(y, *back(jnp.sin(y))) for y, back in runs]


@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 3), rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_tiles_give_the_convolution_and_its_gradients(batch, rows, columns, seed):
    draw = np.random.default_rng(seed).normal
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(draw(size=(batch, rows + 2, columns + 2, 3))), jnp.asarray(draw(size=(3, 3, 3, 2)))
        for got, expected in zip(*_both(x, kernel), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_float32_is_as_exact_in_tiles_as_in_the_convolution():
    draw = np.random.default_rng(0).normal
    x, kernel = draw(size=(2, 16, 16, 64)), draw(size=(3, 3, 64, 64)) / 24
    exact = sum(x[:, i : i + 14, j : j + 14] @ kernel[i, j] for i in range(3) for j in range(3))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    error, of_convolution = (np.abs(f(x, kernel) - exact).max() for f in (convolved_3x3, _reference))
    # Twice: which of the two rounds less depends on how the compiler sums.
    assert error < 2 * of_convolution + 1e-6


def test_derivatives_run_forwards_too(x64):
    draw = np.random.default_rng(0).normal
    x, kernel, dx, dk = (jnp.asarray(draw(size=s)) for s in [(1, 4, 5, 3), (3, 3, 3, 2)] * 2)
    got, expected = (jax.jvp(f, (x, kernel), (dx, dk))[1] for f in (convolved_3x3, _reference))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_windows_of_3_by_3_that_move_by_one_take_tiles_where_there_are_many(monkeypatch):
    seen = []
    module = importlib.import_module("subspace_jax.nn.layers.conv")
    monkeypatch.setattr(module, "convolved_3x3", lambda x, w: seen.append(x.shape) or convolved_3x3(x, w))

    def tiles(shape, kernel, **how):
        seen.clear()
        got = jax.jit(lambda x, w: nn.conv(x, w, **how)).lower(jnp.ones(shape), jnp.ones(kernel))
        assert "stablehlo.convolution" not in got.as_text()
        return bool(seen)

    # Padding counts: 2 x 12 x 11 outputs are enough, those of a picture less wide are not.
    assert tiles((2, 12, 11, 32), (3, 3, 32, 64))
    assert not tiles((2, 12, 10, 32), (3, 3, 32, 64))
    assert not tiles((2, 12, 11, 32), (3, 3, 32, 64), padding="VALID")
    assert not tiles((2, 12, 11, 16), (3, 3, 16, 64))
    assert not tiles((2, 24, 24, 32), (3, 3, 32, 64), strides=2)
    assert not tiles((2, 24, 24, 32), (3, 3, 32, 64), dilation=(1, 2))
    assert not tiles((2, 24, 24, 32), (3, 1, 32, 64))


def test_a_batch_split_over_explicit_axes_is_convolved_too():
    draw = np.random.default_rng(0).normal
    x, kernel = jnp.asarray(draw(size=(4, 9, 9, 32)), jnp.float32), jnp.asarray(draw(size=(3, 3, 32, 64)), jnp.float32)

    @jax.jit
    def both(x, kernel):
        y, back = jax.vjp(nn.conv, x, kernel)
        return y, *back(y)

    mesh = train.make_mesh(data=2, fsdp=2, tensor=2, axis_type=AxisType.Explicit)
    placed = [jax.device_put(z, NamedSharding(mesh, spec)) for z, spec in ((x, P("data")), (kernel, P()))]
    for got, expected in zip(both(*placed), both(x, kernel), strict=True):
        # Float32 sums of thousands of products, in another order.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got / scale, expected / scale, rtol=0, atol=1e-5)
