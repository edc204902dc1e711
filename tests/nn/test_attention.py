import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import nn


def by_hand(query, key, value, sees):
    """Attention in float64, head by head, from its definition."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    out = np.zeros_like(query)
    for b in range(query.shape[0]):
        for a in range(query.shape[2]):
            scores = query[b, :, a] @ key[b, :, a // group].T / np.sqrt(query.shape[-1])
            weights = np.where(sees[b], np.exp(scores - scores.max()), 0.0)
            out[b, :, a] = weights / weights.sum(-1, keepdims=True) @ value[b, :, a // group]
    return out


def arrays(length=7, heads=4, kv_heads=2):
    draw = np.random.default_rng(0).standard_normal
    return [jnp.asarray(draw((2, length, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("window", [None, 3])
def test_attention_shares_key_heads_between_query_heads_in_order(window):
    query, key, value = arrays()
    i, j = np.indices((7, 7))
    sees = (j <= i) & (i - j < (window or 7))
    mask = nn.causal_mask(jnp.arange(7), jnp.arange(7)[None], jnp.arange(7)[None], window=window)
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(functools.partial(nn.attention, window=window))(query, key, value)
        masked = jax.jit(nn.attention)(query, key, value, mask=mask)
    expected = by_hand(query, key, value, np.stack([sees, sees]))
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    np.testing.assert_allclose(masked, expected, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.booleans(), min_size=6, max_size=6), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_causal_mask_follows_window_padding_and_segments(valid, steps):
    segments = np.cumsum(steps)
    positions = np.arange(6)
    mask = nn.causal_mask(
        jnp.arange(6),
        jnp.asarray(positions)[None],
        jnp.asarray(positions)[None],
        window=4,
        key_valid=jnp.asarray(valid)[None],
        query_segments=jnp.asarray(segments)[None],
        key_segments=jnp.asarray(segments)[None],
    )
    for i in range(6):
        for j in range(6):
            allowed = j <= i and i - j < 4 and valid[j] and segments[i] == segments[j]
            assert mask[0, 0, i, j] == (allowed or i == j)


def test_attention_of_padding_is_finite_in_the_gradient_too():
    query, key, value = arrays()
    mask = nn.causal_mask(jnp.arange(7), jnp.arange(7)[None], jnp.arange(7)[None], key_valid=jnp.zeros((2, 7), bool))
    value_of, grads = jax.jit(jax.value_and_grad(lambda q: jnp.sum(nn.attention(q, key, value, mask=mask))))(query)
    assert np.isfinite(value_of)
    assert np.all(np.isfinite(grads))


def test_attention_computes_softmax_in_float32():
    query, key, value = arrays()
    run = jax.jit(nn.attention)
    rounded = run(*(x.astype(jnp.bfloat16) for x in (query, key, value)))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), run(query, key, value), atol=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_has_the_same_result_and_gradient(monkeypatch, masked):
    query, key, value = arrays(length=12)
    valid = jnp.arange(12)[None] >= jnp.array([[0], [3]])
    slots = jnp.arange(12)
    mask = nn.causal_mask(slots, slots[None], slots[None], window=5, key_valid=valid) if masked else None

    def loss(query, key, value):
        with jax.default_matmul_precision("highest"):
            result = nn.attention(query, key, value, mask=mask)
        return jnp.sum(jnp.sin(result)), result

    # The sum itself rounds by more than any of its terms.
    gradients = functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    whole = jax.jit(gradients(loss))(query, key, value)
    monkeypatch.setattr(importlib.import_module("subspace_jax.nn.layers.attention"), "BLOCK", 4)
    blocks = jax.jit(gradients(lambda *x: loss(*x)))(query, key, value)
    chex.assert_trees_all_close(blocks, whole, rtol=1e-7, atol=2e-5)


def test_attention_uses_xla_without_cudnn():
    shape = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    text = jax.jit(nn.attention).trace(shape, shape, shape).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in text


def test_attention_refuses_unknown_implementations_and_indivisible_heads():
    query, key, value = arrays()
    with pytest.raises(ValueError, match="got 'flash'"):
        nn.attention(query, key, value, implementation="flash")
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        nn.attention(query[:, :, :3], key, value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_and_layer_norm_match_their_definitions(dtype):
    x = (3 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 16))).astype(dtype)
    scale, bias = jax.random.normal(jax.random.key(1), (2, 16))
    wide = np.asarray(x, np.float64)
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    centred = wide - wide.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale) + np.asarray(bias)
    tolerance = {"atol": 1e-5} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for got, expected in (
        (nn.rms_norm(x, scale, 1e-5), rms),
        (nn.layer_norm(x, scale, bias, 1e-5), layer),
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, **tolerance)


@pytest.mark.parametrize("length", [5, 2048])
def test_attention_without_causal_is_bidirectional(length):
    query, key, value = (jax.random.normal(jax.random.key(i), (1, length, 1, 4)) for i in range(3))
    got = jax.jit(functools.partial(nn.attention, causal=False))(query, key, value)
    q, k, v = (np.asarray(x[0, :, 0], np.float64) for x in (query, key, value))
    weights = np.exp(q @ k.T / 2)
    np.testing.assert_allclose(got[0, :, 0], weights @ v / weights.sum(axis=1, keepdims=True), atol=2e-5)
