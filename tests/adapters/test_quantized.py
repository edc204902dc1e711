"""Weights in int8, alone and as the base of adapters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn

DRAW = np.random.default_rng(0).normal


def test_quantize_rounds_to_half_a_step_and_keeps_zeros():
    w = jnp.asarray(DRAW(size=(3, 8, 6)), jnp.float32).at[:, :, 2].set(0)
    got = adapters.quantize({"w": w, "bias": w[0]}, ["w"])
    np.testing.assert_array_equal(got["bias"], w[0])
    weight = got["w"]
    assert weight.values.dtype == jnp.int8
    assert (weight.scale.shape, weight.shape, weight.dtype) == ((3, 6), (3, 8, 6), jnp.float32)
    assert np.all(jnp.abs(weight.dense() - w) <= 0.5001 * weight.scale[:, None])
    np.testing.assert_array_equal(weight.dense()[..., 2], 0)
    # The largest entry of each output is held to rounding.
    np.testing.assert_allclose(jnp.abs(weight.dense()).max(1), jnp.abs(w).max(1), rtol=1e-6)


def test_int8_weights_give_the_outputs_of_the_dense_weight():
    params = {"w": jnp.asarray(DRAW(size=(8, 6)), jnp.float32), "k": jnp.asarray(DRAW(size=(3, 2, 4, 6)), jnp.float32)}
    w = adapters.quantize({"w": params["w"]}, ["w"])["w"]
    k = adapters.quantize({"k": params["k"]}, ["k"], window=2)["k"]
    assert k.scale.shape == (6,)
    x = jnp.asarray(DRAW(size=(3, 8)), jnp.float32)
    np.testing.assert_allclose(nn.linear(x, w), x @ w.dense(), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(nn.unembed(x[:, :6], w), x[:, :6] @ w.dense().T, rtol=2e-5, atol=2e-5)
    tokens = jnp.array([[0, 7], [3, 8]])
    got = nn.embed(tokens, w)
    np.testing.assert_array_equal(got[0], w.dense()[jnp.array([0, 7])])
    assert np.all(np.isnan(got[1, 1]))
    images = jnp.asarray(DRAW(size=(2, 5, 5, 8)), jnp.float32)
    np.testing.assert_allclose(nn.conv(images, k, groups=2), nn.conv(images, k.dense(), groups=2), rtol=2e-5, atol=2e-5)
    # In bfloat16 the integers are exact, and the sum is scaled before it is rounded.
    half = x.astype(jnp.bfloat16)
    exact = half.astype(jnp.float32) @ w.dense()
    np.testing.assert_allclose(nn.linear(half, w).astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


def test_prepare_refuses_to_factor_or_train_quantized_weights():
    params = adapters.quantize({"w": jnp.ones((4, 5))}, ["w"])
    for setting in (adapters.SVFit(1), adapters.Effort(1), adapters.LoRA(1, 1.0, init="pissa"), adapters.Full()):
        with pytest.raises(TypeError, match="which is quantized"):
            adapters.prepare(jax.random.key(0), params, {"w": setting})
    with pytest.raises(TypeError, match="expected a floating-point weight"):
        adapters.quantize({"w": jnp.ones((4, 5), jnp.int32)}, ["w"])
    with pytest.raises(ValueError, match="matches none of"):
        adapters.quantize({"w": jnp.ones((4, 5))}, ["v"])
    with pytest.raises(ValueError, match="does not fit a quantized weight"):
        nn.linear(jnp.ones((1, 3)), params["w"])
    # PiSSA's residual may be, and the adapter goes on it.
    pissa = {"w": adapters.LoRA(1, 1.0, init="pissa")}

    @jax.jit
    def run(key, params):
        base, start = adapters.prepare(key, params, pissa)
        return adapters.bind(adapters.quantize(base, ["w"]), start, pissa)["w"].dense()

    np.testing.assert_allclose(run(jax.random.key(0), {"w": jnp.eye(4)}), jnp.eye(4), atol=1e-6)
    chex.assert_trees_all_equal(adapters.dequantize(params)["w"], params["w"].dense())
