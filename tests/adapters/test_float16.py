"""Weights of float16, as many published models hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn

RULES = {
    "linear": {
        "lora": adapters.LoRA(4, 8.0),
        "dora": adapters.DoRA(4, 8.0),
        "pissa": adapters.DoRA(4, 8.0, init="pissa"),
    },
    "conv": {"lora": adapters.LoRA(4, 8.0, window=2), "dora": adapters.DoRA(4, 8.0, window=2)},
}
SHAPES = {"linear": ((16, 24), (4, 16)), "conv": ((3, 3, 8, 16), (2, 5, 6, 8))}


FLOATS = (jnp.float32, jnp.float16, jnp.bfloat16)
QUICK = (("linear", "dora", jnp.float16),)


@pytest.mark.parametrize(
    ("kind", "name", "activations"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id=f"{kind}-{name}-{activations.__name__}")
        for kind in RULES
        for name in RULES[kind]
        for activations in FLOATS
        for case in [(kind, name, activations)]
    ],
)
def test_bind_materialize_merge_and_unmerge_take_float16_weights(kind, name, activations):
    rules, (shape, seen) = {name: RULES[kind][name]}, SHAPES[kind]
    draw = np.random.default_rng(0).normal
    params = {name: {"kernel": jnp.asarray(draw(size=shape), jnp.float16)}}
    base, trainable = adapters.prepare(jax.random.key(0), params, rules)
    trainable = jax.tree.map(lambda p: p + jnp.asarray(0.1 * draw(size=p.shape), p.dtype), trainable)
    assert base[name]["kernel"].dtype == jnp.float16
    dense = adapters.materialize(base, trainable, rules)[name]["kernel"]
    assert dense.dtype == jnp.float16
    x = jnp.asarray(draw(size=seen), activations)

    def outputs(trainable, base):
        weight = adapters.bind(base, trainable, rules)[name]["kernel"]
        return nn.linear(x, weight) if kind == "linear" else nn.conv(x, weight, strides=1, padding=1, groups=1)

    got = outputs(trainable, base)
    assert got.dtype == activations
    want = nn.linear(x, dense) if kind == "linear" else nn.conv(x, dense, strides=1, padding=1, groups=1)
    # The formed weight is rounded to float16, what a layer adds up to the type of the activations.
    tolerance = 0.02 if activations == jnp.bfloat16 else 4e-3
    got, want = (np.asarray(y, np.float32) for y in (got, want))
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    merged, kept = adapters.merge(base, trainable, rules, keep=True)
    np.testing.assert_array_equal(merged[name]["kernel"], dense)
    assert_near(adapters.unmerge(merged, trainable, rules, kept), base)
    grads = jax.grad(lambda t: jnp.sum(jnp.sin(outputs(t, base).astype(jnp.float32))))(trainable)
    assert all(jnp.all(jnp.isfinite(g)) and jnp.any(g) for g in jax.tree.leaves(grads))


SETTINGS = {
    "lora": adapters.LoRA(2, 4.0),
    "dora": adapters.DoRA(2, 4.0),
    "effort": adapters.Effort(2),
    "effort_projected": adapters.Effort(2, project=True),
    "svfit": adapters.SVFit(4),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "coarse"), [(name, dtype) for dtype in (jnp.float16, jnp.bfloat16) for name in SETTINGS]
)
def test_bind_merge_and_unmerge_take_trained_arrays_of_16_bits(name, coarse):
    rules, draw = {"w": SETTINGS[name]}, np.random.default_rng(0).normal
    params = {"w": {"kernel": jnp.asarray(draw(size=(8, 6)), jnp.float16)}}
    base, trainable = adapters.prepare(jax.random.key(0), params, rules)
    trainable = jax.tree.map(lambda p: (p + 0.1 * jnp.asarray(draw(size=p.shape), p.dtype)).astype(coarse), trainable)
    merged, kept = adapters.merge(base, trainable, rules, keep=True)
    # They mean what they mean in float32.
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), trainable)
    want = adapters.merge(base, wide, rules)["w"]["kernel"]
    assert merged["w"]["kernel"].dtype == jnp.float16
    np.testing.assert_allclose(merged["w"]["kernel"], want, atol=2e-3)
    y = nn.linear(jnp.eye(8, dtype=jnp.float32), adapters.bind(base, trainable, rules)["w"]["kernel"])
    np.testing.assert_allclose(y, np.asarray(want, np.float32), atol=4e-3)
    assert_near(adapters.unmerge(merged, trainable, rules, kept), base)


def assert_near(got, want):
    """Trees of float16, to some of its roundings: a merged weight is rounded, and so is what is taken out of it."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=4e-3 * np.abs(y).max())


def test_dora_takes_factors_of_float16():
    rules = {"w": adapters.DoRA(2, 4.0)}
    params = {"w": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float16)}}
    base, trainable = adapters.prepare(jax.random.key(0), params, rules)
    coarse = jax.tree.map(lambda p: p.astype(jnp.float16), trainable)
    y = nn.linear(jnp.eye(8, dtype=jnp.float16), adapters.bind(base, coarse, rules)["w"]["kernel"])
    np.testing.assert_allclose(y, params["w"]["kernel"], rtol=2e-3)
