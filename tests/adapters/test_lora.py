"""LoRA and DoRA on single weights: dropout, LoRA-GA's start, invariances, bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import adapters, nn

BOTH = pytest.mark.parametrize("method", [pytest.param(adapters.LoRA, marks=pytest.mark.slow), adapters.DoRA])


def drawn(rules, *shape, dtype=np.float32, seed=0):
    """A weight and an adapter away from its start."""
    draw = np.random.default_rng(seed).normal
    params = {"w": jnp.asarray(draw(size=shape), dtype)}
    start = jax.jit(lambda p: adapters.init(jax.random.key(0), p, rules))(params)
    return params, {"w": {k: v + 0.3 * jnp.asarray(draw(size=v.shape), v.dtype) for k, v in start["w"].items()}}


@BOTH
def test_dropout_needs_a_key_and_drops_inputs_of_the_adapter_only(method, x64):
    rules = {"w": method(2, 3.0, dropout=0.4)}
    params, trainable = drawn(rules, 6, 5, dtype=np.float64)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)))

    @jax.jit
    def run(key, x):
        weight = adapters.bind(params, trainable, rules, key=key)["w"]
        return nn.linear(x, weight), weight.key

    y, own = run(jax.random.key(1), x)
    merged = adapters.merge(params, trainable, rules)["w"]
    np.testing.assert_allclose(run(None, x)[0], x @ merged, atol=1e-13)
    # The same draw by hand: what is kept is scaled up, and the frozen branch sees all.
    kept = jax.random.bernoulli(own, 0.6, x.shape)
    assert 0 < np.mean(kept) < 1
    seen = np.where(kept, x / 0.6, 0)
    np.testing.assert_allclose(y, x @ params["w"] + seen @ (merged - params["w"]), atol=1e-13)
    assert not np.array_equal(run(jax.random.key(2), x)[0], y)
    np.testing.assert_array_equal(run(jax.random.key(1), x)[0], y)


def test_stacked_weights_have_dropout_keys_of_their_own():
    rules = {"w": adapters.LoRA(2, 3.0, dropout=0.5)}
    params, trainable = drawn(rules, 3, 6, 6)
    bound = adapters.bind(params, trainable, rules, key=jax.random.key(0))["w"]
    assert bound.key.shape == (3,)
    x = jnp.ones((4, 6))

    @jax.jit
    def layers(bound):
        return jax.lax.scan(lambda c, w: (c, (w.key, nn.linear(x, w))), 0, bound)[1]

    keys, _ = layers(bound)
    assert len({tuple(np.asarray(jax.random.key_data(k))) for k in keys}) == 3
    axes = {"w": jax.sharding.PartitionSpec("layers", "embed", "mlp")}
    names = adapters.bind(*adapters.logical_axes(axes, trainable, rules), rules, key=jax.random.key(0))
    assert jax.tree.structure(names) == jax.tree.structure({"w": bound})
    with pytest.raises(TypeError, match=r"key: expected one of jax\.random\.key"):
        adapters.bind(params, trainable, rules, key=jnp.zeros(2, jnp.uint32))


def test_lora_ga_begins_with_the_singular_vectors_of_the_gradient(golden, x64):
    g = golden("adaprelora/peers_oracle")
    rank = int(g["ga_rank"])
    # The oracle's weights are [out, in].
    a, b = adapters.lora_ga_factors(jnp.asarray(g["ga_G"].T), rank)
    np.testing.assert_allclose(a @ a.T, g["ga_gram_A"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(b.T @ b, g["ga_BAgram_B"], rtol=1e-9, atol=1e-12)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(20, 18)))}
    grads = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(20, 18)))}
    rules = {"w": adapters.LoRA(2, 6.0, init="lora_ga")}
    prepare = jax.jit(functools.partial(adapters.prepare, settings=rules))
    base, start = prepare(jax.random.key(0), params, gradients=grads)
    np.testing.assert_allclose(adapters.merge(base, start, rules)["w"], params["w"], atol=1e-13)
    # Orthogonal columns of one length, c squared, also out of a sketch.
    c = 18**0.25 / 4
    np.testing.assert_allclose(start["w"]["a"].T @ start["w"]["a"], c**2 * np.eye(2), atol=1e-12)
    with pytest.raises(ValueError, match="gradients: LoRA-GA needs"):
        adapters.prepare(jax.random.key(0), params, rules)
    with pytest.raises(ValueError, match="twice the rank"):
        adapters.lora_ga_factors(grads["w"], 10)
    with pytest.raises(ValueError, match="call prepare instead"):
        adapters.init(jax.random.key(0), params, rules)


def test_pissa_begins_like_the_oracle(x64, golden):
    data = golden("adaprelora/peers_oracle")
    rank, scale = int(data["pissa_rank"]), float(data["pissa_scale"])
    setting = adapters.LoRA(rank, scale * rank, init="pissa")
    prepare = jax.jit(functools.partial(adapters.prepare, settings={"w": setting}))
    base, start = prepare(jax.random.key(0), {"w": jnp.asarray(data["pissa_W"].T)})
    a, b = (start["w"][name] for name in "ab")
    for got, expected in ((base["w"].T, "pissa_Wres"), ((a @ b).T, "pissa_BA"), (a.T @ a, "pissa_gramA")):
        np.testing.assert_allclose(got, data[expected], rtol=1e-9, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), by=st.floats(0.2, 5.0))
def test_lora_and_dora_are_invariant_to_a_change_of_basis_and_dora_scales_with_its_magnitude(seed, by):
    """Any basis of the rank gives one weight, DoRA's columns have their magnitudes, and its outputs grow with them."""
    draw = np.random.default_rng(seed).normal
    w, a, b, m, x = (jnp.asarray(draw(size=s), jnp.float32) for s in ((7, 5), (7, 2), (2, 5), (5,), (3, 7)))
    change = jnp.asarray(np.linalg.qr(draw(size=(2, 2)))[0] * by, jnp.float32)
    y, dense = both(w, a, b, m, x)
    again, _ = both(w, a @ change, jnp.linalg.inv(change) @ b, m, x)
    for got, expected in zip(again, y, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max()))
    np.testing.assert_allclose(jnp.linalg.norm(dense, axis=0), jnp.abs(m), rtol=1e-5)
    longer, _ = both(w, a, b, by * m, x)
    np.testing.assert_allclose(longer[1], by * y[1], atol=1e-4 * by * float(jnp.abs(y[1]).max()))


@jax.jit
def both(w, a, b, m, x):
    rules = {"lora": adapters.LoRA(2, 3.0), "dora": adapters.DoRA(2, 3.0)}
    own = {"lora": {"a": a, "b": b}, "dora": {"a": a, "b": b, "magnitude": m}}
    bound = adapters.bind({"lora": w, "dora": w}, own, rules)
    with jax.default_matmul_precision("highest"):
        return [nn.linear(x, bound[name]) for name in own], bound["dora"].dense()


@pytest.mark.slow
@BOTH
def test_bfloat16_outputs_are_within_one_unit_in_the_last_place(method):
    """Of the output's scale: a sum that cancels has the errors of what it was made from."""
    rules = {"w": method(8, 16.0)}
    params, trainable = drawn(rules, 64, 48, dtype=jnp.bfloat16)
    trainable = jax.tree.map(lambda p: 0.2 * p if p.ndim > 1 else p, trainable)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 64)), jnp.bfloat16)
    got = np.asarray(jax.jit(lambda t: nn.linear(x, adapters.bind(params, t, rules)["w"]))(trainable), np.float64)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    exact = np.asarray(x, np.float64) @ np.asarray(adapters.merge(wide, trainable, rules)["w"], np.float64)
    row = np.abs(exact).max(axis=1, keepdims=True)
    unit = 2.0 ** (np.floor(np.log2(row)) - 7)
    assert np.max(np.abs(got - exact) / unit) <= 1.0
    # What PEFT's users see who merge: the weight is rounded before it is used.
    merged = jnp.matmul(x, adapters.merge(params, trainable, rules)["w"])
    assert np.max(np.abs(np.asarray(merged, np.float64) - exact) / unit) <= 1.5


@pytest.mark.parametrize("rows", [32, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (16, 64))])
def test_magnitudes_of_new_dora_are_the_norms_of_the_columns(rows):
    # With 32 rows a CPU's compiler made infinities of the product with zeros.
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, rows, 128)), jnp.float32)
    rules = {"w": adapters.DoRA(4, 8.0)}
    start = jax.jit(lambda w: adapters.init(jax.random.key(0), {"w": w}, rules))(w)
    np.testing.assert_allclose(start["w"]["magnitude"], jnp.linalg.norm(w, axis=1), rtol=1e-5)
