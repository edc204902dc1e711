"""The contract of adapters of every method, on a language model with stacked layers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from subspace_jax import adapters, nn, train

from ..variants import rest_slow
from . import cases

# The battery has every method on single and stacked weights.
QUICK = ("tables",)
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in cases.RULES]
)


@functools.cache
def prepared(name):
    base, start = cases.prepare(name)
    return base, start, cases.moved(start)


@functools.cache
def bound_logits(name):
    base, _, trainable = prepared(name)
    return cases.logits(adapters.bind(base, trainable, cases.RULES[name]), cases.tokens(2, 8))


@every_case
def test_merge_gives_the_logits_of_bind_and_unmerge_the_weights(name):
    base, _, trainable = prepared(name)
    merged, kept = adapters.merge(base, trainable, cases.RULES[name], keep=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, cases.params())
    expected, tokens = bound_logits(name), cases.tokens(2, 8)
    # Four layers of matmuls in float32.
    size = float(jnp.abs(expected).max())
    chex.assert_trees_all_close(cases.logits(merged, tokens), expected, rtol=1e-5, atol=1e-5 * size)
    assert float(jnp.abs(expected - cases.logits(cases.params(), tokens)).max()) > 1e-2
    back = jax.jit(lambda *args: adapters.unmerge(args[0], args[1], cases.RULES[name], args[2]))(
        merged, trainable, kept
    )
    jax.tree.map(
        lambda x, y: chex.assert_trees_all_close(x, y, rtol=0, atol=2e-6 * float(jnp.abs(y).max())), back, base
    )


@pytest.mark.parametrize("kind", [adapters.LoRA, adapters.DoRA])
def test_bind_and_merge_refuse_factors_of_another_rank_than_the_settings(kind):
    params = {"kernel": jnp.ones((6, 5))}
    trainable = adapters.init(jax.random.key(0), params, {"kernel": kind(4, 8.0)})
    for call in (adapters.bind, adapters.merge):
        with pytest.raises(ValueError, match="trainable: expected factors of rank 2, as the settings say, got 4"):
            call(params, trainable, {"kernel": kind(2, 8.0)})


@every_case
def test_bind_of_new_adapters_gives_the_bits_of_the_model(name):
    base, start, _ = prepared(name)
    got = cases.logits(adapters.bind(base, start, cases.RULES[name]), cases.tokens(2, 8))
    expected = cases.logits(cases.params(), cases.tokens(2, 8))
    if name in ("pissa", "effort"):
        # What is subtracted from the weight is added again, and rounded.
        chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
    else:
        chex.assert_trees_all_equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.RULES)
def test_gradients_of_bind_and_materialize_agree_and_reach_adapters_only(name):
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
        chex.assert_trees_all_close(got, expected, rtol=1e-7, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    "name", rest_slow(["lora", *(name for name in cases.RULES if name not in ("lora", "svfit relu"))])
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_backward_pass_of_bind_keeps_no_copy_of_frozen_weights(name, dtype):
    rules, tokens = cases.RULES[name], cases.tokens(2, 8)
    base, trainable = jax.eval_shape(
        functools.partial(adapters.prepare, settings=rules), jax.random.key(0), cases.params()
    )
    if dtype == "int8":
        base = jax.eval_shape(lambda base: adapters.quantize(base, ["re:layers/attn/[a-z]*/kernel(/weight)?"]), base)

    def residuals(base, trainable):
        return jax.vjp(lambda own: cases.logits(adapters.bind(base, own, rules), tokens), trainable)[1]

    jaxpr = jax.make_jaxpr(residuals)(base, trainable).jaxpr
    frozen = [x for eqn in jaxpr.eqns if eqn.primitive.name == "stop_gradient" for x in eqn.outvars]
    kept = [x.aval.shape for x in jaxpr.outvars if x not in (*jaxpr.invars, *frozen)]
    weights = [x.shape for x in jax.tree.leaves(base["layers"]) if x.ndim > 2]
    assert not set(kept) & set(weights)


def _paths(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    return list(dict.fromkeys("/".join(k.key for k in path[:-1]) for path, _ in leaves))


@pytest.mark.eight_devices
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "tables", "dora layers", "svfit"])
def test_bind_of_sharded_trees_gives_the_logits_of_one_device(name):
    base, _, trainable = prepared(name)
    rules, tokens = cases.RULES[name], cases.tokens(2, 8)
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    axes = adapters.logical_axes(nn.param_axes(cases.CONFIG), trainable, rules)
    placed = [
        jax.device_put(tree, train.param_shardings(tree, names, mesh))
        for tree, names in zip((base, trainable), axes, strict=True)
    ]
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    spec = jax.sharding.PartitionSpec
    layer = jax.tree.map(lambda names: spec(*names[1:]), adapters.bind(*axes, rules)["layers"])
    options = nn.LayerOptions(on_layer=functools.partial(train.all_gather_params, axes=layer))

    @jax.jit
    def run(base, trainable):
        params = adapters.bind(base, trainable, rules)
        with jax.default_matmul_precision("highest"), train.use_mesh(mesh):
            return nn.causal_lm_apply(cases.CONFIG, params, tokens, options=options).logits

    expected = bound_logits(name)
    for got in (cases.logits(adapters.bind(*placed, rules), tokens), run(*placed)):
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", ["tables", pytest.param("full", marks=pytest.mark.slow)])
def test_a_checkpoint_restores_the_trainable_tree(name, tmp_path):
    _, _, trainable = prepared(name)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", trainable)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "state", jax.eval_shape(lambda: trainable))
    chex.assert_trees_all_equal(back, trainable)


@pytest.mark.parametrize("name", [name for name in cases.RULES if name != "svfit relu"])
def test_prepare_works_on_shapes(name):
    run = functools.partial(adapters.prepare, settings=cases.RULES[name])
    _, shapes = jax.eval_shape(run, jax.random.key(5), cases.params())
    axes = adapters.logical_axes(nn.param_axes(cases.CONFIG), shapes, cases.RULES[name])[1]
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    assert jax.tree.map(len, axes, is_leaf=is_spec) == jax.tree.map(lambda x: x.ndim, shapes)


def test_values_of_an_adapter_depend_on_key_and_path_alone():
    together = prepared("lora")[1]["layers"]["attn"]["qkv"]
    init = jax.jit(functools.partial(adapters.init, settings={"qkv": adapters.LoRA(4, 8.0)}))
    alone, other = (init(jax.random.key(seed), cases.params())["layers"]["attn"]["qkv"] for seed in (5, 6))
    chex.assert_trees_all_close(alone, together, rtol=0, atol=1e-7)
    assert not np.any(other["kernel"]["a"] == together["kernel"]["a"])


def test_describe_lists_every_adapter_and_count_counts():
    rules = cases.RULES["lora"]
    base, _, trainable = prepared("lora")
    text = adapters.describe(base, trainable, rules)
    lines = text.splitlines()
    assert len(lines) == 1 + 4 + 1
    assert [line.split()[0] for line in lines][1:] == [*_paths(trainable), "total"]
    assert "rsLoRA" in text
    total = 4 * (4 * (32 + 96) + 4 * (32 + 32) + 2 * 2 * (32 + 128))
    assert adapters.count(trainable) == total
    assert f"{total:,}" in lines[-1]


def test_label_fn_partitions_an_optimizer():
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


def test_label_fn_labels_singular_vectors_of_the_base_as_frozen():
    rules = {"w": adapters.SVFit(2)}
    base, trainable = adapters.prepare(jax.random.key(0), {"w": jnp.eye(3)}, rules)
    labels = jax.tree.leaves(adapters.label_fn(adapters.bind(base, trainable, rules)))
    assert sorted(labels) == ["frozen"] * 4 + ["spectrum"]


def test_roles_name_magnitudes_and_probes():
    params, rules = {"w": jnp.ones((4, 3)), "v": jnp.ones((4, 3))}, {"w": adapters.DoRA(2, 2.0), "v": adapters.SVFit(1)}
    trainable = adapters.prepare(jax.random.key(0), params, rules)[1]
    assert adapters.roles(trainable, rules) == {"w/magnitude": "no_decay", "v/delta": "no_decay"}
    probed = jax.eval_shape(adapters.add_gradient_probes, {"w": trainable["w"]})
    assert adapters.roles(probed, {"w": rules["w"]}) == {
        "w/magnitude": "no_decay",
        "w/row_energy": "probe",
        "w/column_energy": "probe",
    }


@pytest.mark.slow
def test_layers_of_rank_zero_and_padding_of_the_rank_stay_zero():
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


def test_bad_input_raises_by_name():
    params, rules = cases.params(), {"qkv": adapters.LoRA(2, 4.0)}
    trainable = adapters.init(jax.random.key(0), params, rules)
    with pytest.raises(ValueError, match="settings: 'query' matches none of"):
        adapters.init(jax.random.key(0), params, {"query": adapters.LoRA(2, 4.0)})
    with pytest.raises(ValueError, match="settings: expected at least one rule, got none"):
        adapters.init(jax.random.key(0), params, {})
    with pytest.raises(ValueError, match="matches none of"):
        adapters.init(jax.random.key(0), params, {"attn_norm/scale": adapters.LoRA(2, 4.0)})
    with pytest.raises(ValueError, match="not the adapters of these settings"):
        adapters.bind(params, trainable, {"up": adapters.LoRA(2, 4.0)})
    with pytest.raises(ValueError, match="have no weights for"):
        adapters.bind({"embed": params["embed"]}, trainable, rules)
    with pytest.raises(ValueError, match="lacks 'b'"):
        adapters.bind(params, {"layers": {"attn": {"qkv": {"kernel": {"a": jnp.ones((4, 32, 2))}}}}}, rules)
    with pytest.raises(ValueError, match="2 for the layers of a weight"):
        adapters.init(jax.random.key(0), params, {"qkv": adapters.LoRA((1, 2), 4.0)})
    with pytest.raises(TypeError, match="floating-point"):
        adapters.init(jax.random.key(0), {"w": jnp.ones((2, 2), jnp.int32)}, {"w": adapters.LoRA(1, 1.0)})
    with pytest.raises(ValueError, match="call prepare instead"):
        adapters.init(jax.random.key(0), params, {"qkv": adapters.SVFit(2)})
    spectral = {"layers": {"attn": {"qkv": {"kernel": {"delta": jnp.zeros((4, 2))}}}}}
    with pytest.raises(ValueError, match="needs the tree that prepare returned"):
        adapters.bind(params, spectral, {"qkv": adapters.SVFit(2)})
    with pytest.raises(ValueError, match="not the adapters of these settings"):
        adapters.bind(params, trainable, {"qkv": adapters.SVFit(2)})
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
def test_lora_and_dora_refuse_ranks_and_alphas_out_of_range(method, arguments):
    with pytest.raises(ValueError, match=r"rank|alpha"):
        method(*arguments)
    with pytest.raises(ValueError, match="init: expected one of"):
        method(2, 2.0, init="zero")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (adapters.LoRA(2, 4.0), r"settings: expected a dict of rules and adapter configs, got LoRA\("),
        ({"up": adapters.LoRA}, r"settings: expected an adapter config for 'up', such as LoRA\(8, 16.0\), got <class"),
    ],
)
def test_init_and_prepare_refuse_settings_of_another_type(settings, message):
    for make in (adapters.init, adapters.prepare):
        with pytest.raises(TypeError, match=message):
            make(jax.random.key(0), {"up": {"kernel": jnp.ones((2, 2))}}, settings)
