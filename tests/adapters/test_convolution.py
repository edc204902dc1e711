"""LoRA and DoRA on convolutions and tables, against what PEFT and DoRA's authors compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn


def channels_last(x):
    return jnp.moveaxis(x, 1, -1)


def kernel(w):
    """``[out, in, ...]`` of torch as ``[..., in, out]``."""
    return jnp.moveaxis(w, (1, 0), (-2, -1))


@pytest.mark.parametrize("name", ["conv2d_groups", pytest.param("conv2d", marks=pytest.mark.slow)])
def test_dora_convolutions_and_their_gradients_are_those_of_peft(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"dora/{name}").items()}
    rank, groups = g["A"].shape[0], int(g["groups"])
    rules = {"w": adapters.DoRA(rank, rank * float(g["s"]), window=2, groups=groups)}
    own = {"a": kernel(g["A"]), "b": kernel(g["B"])[0, 0], "magnitude": g["m"].reshape(-1)}
    how = {"strides": int(g["stride"]), "padding": tuple(map(int, g["pad"])), "groups": groups}

    def apply(own):
        weight = adapters.bind({"w": kernel(g["W"])}, {"w": own}, rules)["w"]
        y = nn.conv(channels_last(g["x"]), weight, **how)
        return y + jnp.broadcast_to(g["bias"], y.shape), weight.norm

    @jax.jit
    def run(own, d):
        y, back, norm = jax.vjp(apply, own, has_aux=True)
        return y, norm, back(d)[0]

    y, norm, got = run(own, channels_last(g["dout"]))
    np.testing.assert_allclose(norm, g["norm"].reshape(-1), rtol=1e-12)
    np.testing.assert_allclose(y, channels_last(g["y"]), rtol=1e-9, atol=1e-12)
    expected = {"a": kernel(g["dA"]), "b": kernel(g["dB"])[0, 0], "magnitude": g["dm"].reshape(-1)}
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12)


def test_dora_tables_and_their_gradients_are_those_of_peft(golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden("dora/embedding").items()}
    rules = {"embedding": adapters.DoRA(3, 3 * float(g["s"]))}
    own = {"a": g["A"].T, "b": g["B"].T, "magnitude": g["m"]}

    def apply(own):
        weight = adapters.bind({"embedding": g["E"]}, {"embedding": own}, rules)["embedding"]
        return nn.embed(g["ids"], weight), weight.gain

    y, back, gains = jax.vjp(jax.jit(apply), own, has_aux=True)
    np.testing.assert_allclose(gains, g["g"], rtol=1e-12)
    np.testing.assert_allclose(y, g["y"], rtol=1e-9, atol=1e-12)
    (got,) = back(g["dout"])
    for key, value in {"a": g["dA"].T, "b": g["dB"].T, "magnitude": g["dm"]}.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "space", "groups"),
    [(adapters.DoRA, 2, 2), *(pytest.param(adapters.LoRA, space, 1, marks=pytest.mark.slow) for space in (1, 3))],
)
def test_a_convolution_with_an_adapter_equals_one_with_the_merged_kernel(method, space, groups, x64):
    draw = np.random.default_rng(0).normal
    params = {"w": jnp.asarray(draw(size=(*(3, 2, 3)[:space], 4, 6)))}
    rules = {"w": method(2, 3.0, window=space, groups=groups)}
    start = jax.jit(lambda p: adapters.init(jax.random.key(1), p, rules))(params)
    x = jnp.asarray(draw(size=(2, *(5, 6, 4)[:space], 4 * groups)))

    @jax.jit
    def run(own):
        bound, formed = (put(params, own, rules)["w"] for put in (adapters.bind, adapters.materialize))
        return [nn.conv(x, w, strides=2, padding=1, groups=groups) for w in (bound, formed, params["w"])]

    at_start, _, plain = run(start)
    np.testing.assert_array_equal(at_start, plain)
    leaves, tree = jax.tree.flatten(start)
    moved = tree.unflatten(p + np.random.default_rng(i).normal(size=p.shape) for i, p in enumerate(leaves))
    got, expected, _ = run(moved)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    merged, kept = adapters.merge(params, moved, rules, keep=True)
    np.testing.assert_allclose(adapters.unmerge(merged, moved, rules, kept)["w"], params["w"], atol=1e-12)


def test_a_pissa_convolution_begins_with_the_leading_part_of_its_kernel(x64):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)))}
    rules = {"w": adapters.LoRA(2, 3.0, init="pissa", window=1)}
    base, start = jax.jit(functools.partial(adapters.prepare, settings=rules))(jax.random.key(1), params)
    np.testing.assert_allclose(adapters.merge(base, start, rules)["w"], params["w"], atol=1e-13)
    values = np.linalg.svd(params["w"].reshape(12, 6), compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(base["w"].reshape(12, 6), compute_uv=False)[:4], values[2:], rtol=1e-10)


def test_lora_refuses_fields_of_convolutions_that_do_not_fit():
    for message, arguments in {
        "window: expected": {"window": 4},
        "groups: expected at least 1": {"groups": 2},
        "groups: expected to divide": {"window": 2, "groups": 3},
        "dropout: expected": {"dropout": 1.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            adapters.LoRA(4, 4.0, **arguments)
    with pytest.raises(ValueError, match="window: expected"):
        adapters.DoRA((2, 2), 4.0, window=1)
    params, rules = {"w": jnp.ones((3, 3, 4, 6))}, {"w": adapters.LoRA(2, 2.0, window=2, groups=2)}
    trainable = adapters.init(jax.random.key(0), params, rules)
    with pytest.raises(ValueError, match="has 1, its adapter was set for 2"):
        nn.conv(jnp.ones((1, 4, 4, 4)), adapters.bind(params, trainable, rules)["w"])
    with pytest.raises(ValueError, match="is no kernel with a window of 3 axes"):
        adapters.init(jax.random.key(0), params, {"w": adapters.LoRA(2, 2.0, window=3)})
