"""What holds for adapters of every method over a language model with stacked layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from subspace_jax import adapters, nn, train

from . import cases

_LIKE_OTHERS = ("gaussian", "tables", "dora table", "dora layers", "svfit relu", "full")
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in _LIKE_OTHERS else []) for name in cases.RULES]
)


@functools.cache
def prepared(name):
    base, start = adapters.prepare(jax.random.key(5), cases.params(), cases.RULES[name])
    return base, start, cases.moved(start)


@functools.cache
def bound_logits(name):
    base, _, trainable = prepared(name)
    return cases.logits(adapters.bind(base, trainable, cases.RULES[name]), cases.tokens(2, 8))


@every_case
def test_bound_equals_materialized_equals_merged(name):
    base, _, trainable = prepared(name)
    formed = adapters.materialize(base, trainable, cases.RULES[name])
    merged = adapters.merge(base, trainable, cases.RULES[name])
    assert jax.tree.map(jnp.shape, formed) == jax.tree.map(jnp.shape, cases.params())
    expected = bound_logits(name)
    # Four layers of products in float32.
    for params in (formed, merged):
        got = cases.logits(params, cases.tokens(2, 8))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    plain = cases.logits(cases.params(), cases.tokens(2, 8))
    assert float(jnp.abs(expected - plain).max()) > 1e-2


@every_case
def test_the_start_changes_nothing_bit_for_bit(name):
    base, start, _ = prepared(name)
    got = cases.logits(adapters.bind(base, start, cases.RULES[name]), cases.tokens(2, 8))
    expected = cases.logits(cases.params(), cases.tokens(2, 8))
    if name in ("pissa", "effort"):
        # What is taken from the weight is added again, and rounded.
        np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    else:
        np.testing.assert_array_equal(got, expected)


@every_case
def test_unmerge_brings_the_weights_back(name):
    base, _, trainable = prepared(name)
    merged, kept = adapters.merge(base, trainable, cases.RULES[name], keep=True)
    back = adapters.unmerge(merged, trainable, cases.RULES[name], kept)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(base), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6 * float(jnp.abs(expected).max()))


@every_case
def test_gradients_reach_adapters_only_and_equal_those_through_the_weights(name):
    base, _, trainable = prepared(name)
    rules, tokens = cases.RULES[name], cases.tokens(2, 8)

    def loss(trainable, base, put):
        return jnp.mean(jnp.square(cases.logits(put(base, trainable, rules), tokens)))

    grad = jax.jit(jax.grad(loss, (0, 1), allow_int=True), static_argnums=2)
    fast, frozen = grad(trainable, base, adapters.bind)
    slow, _ = grad(trainable, base, adapters.materialize)
    for path in _paths(trainable):
        node = functools.reduce(lambda t, k: t[k], path.split("/"), frozen)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(node))
    for got, expected in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        assert float(jnp.abs(got).max()) > 0
        # Four layers forwards and backwards in float32, through weights that were rounded as they were formed.
        np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def _paths(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    return list(dict.fromkeys("/".join(k.key for k in path[:-1]) for path, _ in leaves))


@pytest.mark.parametrize("name", ["lora", "tables", "dora layers", "svfit"])
def test_eight_devices_equal_one(name):
    base, _, trainable = prepared(name)
    rules, tokens = cases.RULES[name], cases.tokens(2, 8)
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    axes = adapters.logical_axes(nn.param_axes(cases.CONFIG), trainable, rules)
    placed = [
        jax.device_put(tree, train.param_shardings(tree, names, mesh))
        for tree, names in zip((base, trainable), axes, strict=True)
    ]
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    bound_axes = adapters.bind(*axes, rules)
    gather = train.layer_gatherer(bound_axes["layers"], mesh)

    @jax.jit
    def run(base, trainable):
        params = adapters.bind(base, trainable, rules)
        with jax.default_matmul_precision("highest"):
            return nn.causal_lm_apply(cases.CONFIG, params, tokens, options=nn.LayerOptions(on_layer=gather)).logits

    expected = bound_logits(name)
    for got in (cases.logits(adapters.bind(*placed, rules), tokens), run(*placed)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", ["tables", "full"])
def test_a_checkpoint_brings_the_trainable_tree_back(name, tmp_path):
    _, _, trainable = prepared(name)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", trainable)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "state", jax.eval_shape(lambda: trainable))
    jax.tree.map(np.testing.assert_array_equal, back, trainable)


@every_case
def test_values_depend_on_key_and_path_alone(name):
    base, start, _ = prepared(name)
    del base
    again = adapters.prepare(jax.random.key(5), cases.params(), dict(cases.RULES[name]))[1]
    jax.tree.map(np.testing.assert_array_equal, again, start)
    if name == "svfit relu":
        # Values decide the rank.
        return
    shapes = jax.eval_shape(lambda p: adapters.prepare(jax.random.key(5), p, cases.RULES[name])[1], cases.params())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), start)


def test_describe_lists_every_adapter_and_count_counts():
    rules = cases.RULES["lora"]
    base, _, trainable = prepared("lora")
    text = adapters.describe(base, trainable, rules)
    lines = text.splitlines()
    assert len(lines) == 1 + 4 + 1
    assert [line.split()[0] for line in lines][1:] == [*_paths(trainable), "total"]
    assert "rsLoRA" in text
    total = 4 * (4 * (128 + 384) + 4 * (128 + 128) + 2 * 2 * (128 + 512))
    assert adapters.count(trainable) == total
    assert f"{total:,}" in lines[-1]


def test_labels_part_the_optimizer():
    base, _, trainable = prepared("tables")
    labels = adapters.label_fn(trainable)
    assert labels["layers"]["attn"]["qkv"]["kernel"] == {"a": "factor", "b": "factor", "magnitude": "magnitude"}
    bound = adapters.bind(base, trainable, cases.RULES["tables"])
    flat = jax.tree.leaves(adapters.label_fn(bound))
    assert flat.count("factor") == 4
    assert flat.count("magnitude") == 1
    assert set(flat) == {"factor", "magnitude", "frozen"}
    tx = optax.partition({"factor": optax.sgd(0.1), "magnitude": optax.set_to_zero()}, adapters.label_fn)
    updates, _ = tx.update(trainable, tx.init(trainable), trainable)
    assert not np.any(updates["layers"]["attn"]["qkv"]["kernel"]["magnitude"])
    assert np.any(updates["embed"]["embedding"]["a"])


def test_layers_of_rank_zero_and_filled_up_columns_stay_zero():
    trainable = prepared("layers differ")[1]
    a = trainable["layers"]["mlp"]["up"]["kernel"]["a"]
    assert a.shape[-1] == 2
    assert not np.any(a[0])
    assert not np.any(a[2, :, 1])
    rules = cases.RULES["layers differ"]

    def loss(t):
        return jnp.mean(jnp.square(cases.logits(adapters.bind(cases.params(), t, rules), cases.tokens(2, 8))))

    grads = jax.jit(jax.grad(loss))(trainable)["layers"]["mlp"]["up"]["kernel"]
    assert not np.any(grads["a"][0])
    assert not np.any(grads["b"][0])
    assert not np.any(grads["b"][2, 1])
    assert np.any(grads["b"][1])


def test_bad_input_is_named():
    params, rules = cases.params(), {"qkv": adapters.LoRA(2, 4.0)}
    trainable = adapters.init(jax.random.key(0), params, rules)
    with pytest.raises(ValueError, match="matches none of"):
        adapters.init(jax.random.key(0), params, {"query": adapters.LoRA(2, 4.0)})
    with pytest.raises(ValueError, match="matches none of"):
        adapters.init(jax.random.key(0), params, {"attn_norm/scale": adapters.LoRA(2, 4.0)})
    with pytest.raises(ValueError, match="not the adapters of these settings"):
        adapters.bind(params, trainable, {"up": adapters.LoRA(2, 4.0)})
    with pytest.raises(ValueError, match="have no weights for"):
        adapters.bind({"embed": params["embed"]}, trainable, rules)
    with pytest.raises(ValueError, match="lacks 'b'"):
        adapters.bind(params, {"layers": {"attn": {"qkv": {"kernel": {"a": jnp.ones((4, 128, 2))}}}}}, rules)
    with pytest.raises(ValueError, match="2 for the layers of a weight"):
        adapters.init(jax.random.key(0), params, {"qkv": adapters.LoRA((1, 2), 4.0)})
    with pytest.raises(TypeError, match="floating-point"):
        adapters.init(jax.random.key(0), {"w": jnp.ones((2, 2), jnp.int32)}, {"w": adapters.LoRA(1, 1.0)})
    with pytest.raises(ValueError, match="call prepare instead"):
        adapters.init(jax.random.key(0), params, {"qkv": adapters.SVFit(2)})
    spectral = {"layers": {"attn": {"qkv": {"kernel": {"delta": jnp.zeros((4, 2))}}}}}
    with pytest.raises(ValueError, match="needs the tree that prepare returned"):
        adapters.bind(params, spectral, {"qkv": adapters.SVFit(2)})
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), trainable)
    with pytest.raises(ValueError, match="not finite"):
        adapters.merge(params, broken, rules)
    with pytest.warns(UserWarning, match="rank 200 exceeds"):
        adapters.init(jax.random.key(0), params, {"qkv": adapters.LoRA(200, 4.0)})


@pytest.mark.parametrize("method", [adapters.LoRA, adapters.DoRA])
@pytest.mark.parametrize(
    "arguments",
    [
        (0, 1.0),
        (-1, 1.0),
        (1.5, 1.0),
        (True, 1.0),
        (2, 0.0),
        (2, float("nan")),
        ((), 1.0),
        ((0, 0), 1.0),
        ((1, 2), (1.0,)),
    ],
)
def test_ranks_and_alphas_that_mean_nothing_are_refused(method, arguments):
    with pytest.raises(ValueError, match=r"rank|alpha"):
        method(*arguments)
    with pytest.raises(ValueError, match="init: expected one of"):
        method(2, 2.0, init="zero")
