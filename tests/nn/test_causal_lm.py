import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subspace_jax import nn

from ..variants import rest_slow
from .lm import CONFIGS, FAMILIES, next_token_loss, params_of, run, tokens_of

FULL, DOTS = nn.LayerOptions(remat="full"), nn.LayerOptions(remat="dots")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=())
class LowRank:
    """A structured kernel: base plus a low-rank product, never made dense; its arrays are stacked by layer."""

    def __init__(self, base, a, b):
        self.base, self.a, self.b = base, a, b

    def linear(self, x):
        return x @ self.base + (x @ self.a) @ self.b


class LowRankTable(LowRank):
    """A structured embedding, whose rows are changed where words are looked up."""

    def lookup(self, tokens, dtype):
        return (self.base[tokens] + self.a[tokens] @ self.b).astype(dtype)

    def scores(self, x):
        return x @ self.base.T + (x @ self.b.T) @ self.a.T


jax.tree_util.register_dataclass(LowRankTable, data_fields=("base", "a", "b"), meta_fields=())


@pytest.mark.parametrize(
    "name", ["gpt2", "mistral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "qwen2"))]
)
def test_causal_lm_apply_is_causal_and_respects_windows(name):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 1, 20)
    logits = run(config, params, tokens).logits
    late = run(config, params, tokens.at[0, 15].add(1) % 64).logits
    np.testing.assert_array_equal(late[:, :15], logits[:, :15])
    assert jnp.max(jnp.abs(late[:, 15] - logits[:, 15])) > 1e-3
    early = run(config, params, tokens.at[0, 0].add(1) % 64).logits
    reach = 1 + 3 * (5 - 1) if name == "mistral" else 20
    np.testing.assert_allclose(early[:, reach:], logits[:, reach:], atol=1e-5)
    assert jnp.max(jnp.abs(early[:, reach - 1] - logits[:, reach - 1])) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cut", rest_slow([10, 8]))
def test_causal_lm_apply_separates_packed_texts(name, cut):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 1, 20)
    segments = jnp.array([[0] * cut + [3] * (20 - cut)])
    packed = run(config, params, tokens, segment_ids=segments).logits
    for part in (slice(0, cut), slice(cut, 20)):
        alone = run(config, params, tokens[:, part]).logits
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-5)
    given = run(
        config, params, tokens, segment_ids=segments, positions=jnp.array([[*range(cut), *range(20 - cut)]])
    ).logits
    np.testing.assert_allclose(given, packed, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_lm_apply_ignores_padding(name, side):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 2, 12)
    fill = jnp.full((2, 8), 5, jnp.int32)
    rows = jnp.concatenate([fill, tokens] if side == "left" else [tokens, fill], axis=1)
    mask = jnp.zeros((2, 20), jnp.int32)
    mask = mask.at[:, 8:].set(1) if side == "left" else mask.at[:, :12].set(1)
    # A row of nothing but padding must not spoil the batch.
    rows, mask = jnp.concatenate([rows, rows[:1]]), jnp.concatenate([mask, 0 * mask[:1]])
    logits = run(config, params, rows, attention_mask=mask).logits
    assert np.all(np.isfinite(logits))
    inner = logits[:2, 8:] if side == "left" else logits[:2, :12]
    np.testing.assert_allclose(inner, run(config, params, tokens).logits, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cut", rest_slow([7, 9]))
def test_causal_lm_apply_in_parts_with_a_cache_equals_one_pass(name, cut):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 2, 14)
    whole = run(config, params, tokens, capture_hidden=True)
    cache = nn.init_cache(config, 2, 16)
    first = run(config, params, tokens[:, :cut], cache=cache, capture_hidden=True)
    second = run(config, params, tokens[:, cut:], cache=first.cache, capture_hidden=True)
    hidden = jnp.concatenate([first.hidden, second.hidden], axis=2)
    np.testing.assert_allclose(hidden, whole.hidden, atol=1e-5)
    assert second.cache.length == 14


loss_and_grads = jax.jit(jax.value_and_grad(next_token_loss, 1), static_argnums=0, static_argnames="options")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [("gpt2", "full"), ("qwen2", "full"), ("qwen2", "dots")])
def test_remat_of_causal_lm_apply_keeps_gradients(name, remat):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 2, 12)
    plain = loss_and_grads(config, params, tokens)[1]
    again = loss_and_grads(config, params, tokens, options=nn.LayerOptions(remat=remat))[1]
    for expected, got in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert jnp.max(jnp.abs(expected)) > 0
        np.testing.assert_allclose(got, expected, atol=1e-6)


def _wrap(kernel, key, kind=LowRank):
    a = 0.1 * jax.random.normal(key, (*kernel.shape[:-1], 2))
    b = jax.random.normal(key, (*kernel.shape[:-2], 2, kernel.shape[-1]))
    return kind(kernel, a, b), kernel + a @ b


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_causal_lm_apply_takes_structured_kernels_everywhere(name):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 2, 12)

    def replace(path, leaf, which):
        if path[-1].key not in ("kernel", "embedding") or path[0].key == "position":
            return leaf
        key = jax.random.fold_in(jax.random.key(0), leaf.size)
        return _wrap(leaf, key, LowRankTable if path[-1].key == "embedding" else LowRank)[which]

    structured, dense = (
        jax.tree_util.tree_map_with_path(functools.partial(replace, which=which), params) for which in (0, 1)
    )
    assert isinstance(structured["layers"]["mlp"]["down"]["kernel"], LowRank)
    (value, grads), (expected, dense_grads) = (loss_and_grads(config, p, tokens) for p in (structured, dense))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(
        grads["layers"]["mlp"]["up"]["kernel"].base, dense_grads["layers"]["mlp"]["up"]["kernel"], atol=1e-5
    )
    assert grads["layers"]["mlp"]["up"]["kernel"].a.shape == (3, 16, 2)
    assert jnp.max(jnp.abs(grads["embed"]["embedding"].b)) > 0


def test_causal_lm_apply_in_bfloat16_is_close_to_float32():
    config, params, tokens = CONFIGS["llama"], params_of("llama"), tokens_of("llama", 2, 12)
    exact = run(config, params, tokens).logits
    rounded = run(config, params, tokens, dtype=jnp.bfloat16)
    wide = run(config, params, tokens, dtype=jnp.bfloat16, logits_dtype=jnp.float32)
    assert (rounded.logits.dtype, wide.logits.dtype) == (jnp.bfloat16, jnp.float32)
    scale = jnp.max(jnp.abs(exact))
    # A few roundings of 2^-9 in each of three blocks.
    assert jnp.max(jnp.abs(wide.logits - exact)) < 0.05 * scale
    np.testing.assert_array_equal(wide.logits.astype(jnp.bfloat16), rounded.logits)


@pytest.mark.slow
def test_causal_lm_apply_in_bfloat16_has_gradients_close_to_float32():
    config, params, tokens = CONFIGS["llama"], params_of("llama"), tokens_of("llama", 2, 12)
    exact, rounded = (
        jax.jit(jax.grad(functools.partial(next_token_loss, config, dtype=dtype, options=DOTS)))(params, tokens)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.08 * jnp.linalg.norm(a)


def test_layer_options_apply_hooks_to_each_layer_and_the_stream():
    config, params, tokens = CONFIGS["llama"], params_of("llama"), tokens_of("llama", 2, 12)
    seen = []

    def on_layer(layer):
        seen.append(layer["mlp"]["up"]["kernel"].shape)
        return jax.tree.map(lambda x: 2 * x, layer)

    hooks = nn.LayerOptions(on_layer=on_layer, on_stream=lambda x: x + 0.5)
    apply = jax.jit(nn.causal_lm_apply, static_argnums=0, static_argnames="options")
    doubled = apply(config, params, tokens, options=hooks)
    assert seen[0] == (16, 32)
    expected = apply(
        config,
        {**params, "layers": jax.tree.map(lambda x: 2 * x, params["layers"])},
        tokens,
        options=nn.LayerOptions(on_stream=lambda x: x + 0.5),
    )
    np.testing.assert_allclose(doubled.logits, expected.logits, atol=1e-5)
    assert jnp.max(jnp.abs(expected.logits - run(config, params, tokens).logits)) > 1e-2


@pytest.mark.slow
def test_causal_lm_apply_scales_scores_by_layer():
    config, params, tokens = CONFIGS["gpt2"], params_of("gpt2"), tokens_of("gpt2", 1, 20)
    by_layer = run(config.replace(scale_by_layer=True), params, tokens).logits
    # The same as queries that were divided beforehand.
    share = 1 / jnp.arange(1.0, 4.0)
    qkv = params["layers"]["attn"]["qkv"]
    scaled = {
        "kernel": qkv["kernel"].at[:, :, :16].multiply(share[:, None, None]),
        "bias": qkv["bias"].at[:, :16].multiply(share[:, None]),
    }
    layers = {**params["layers"], "attn": {**params["layers"]["attn"], "qkv": scaled}}
    np.testing.assert_allclose(by_layer, run(config, {**params, "layers": layers}, tokens).logits, atol=1e-5)
    unscaled = run(config.replace(scale_scores=False), params, tokens).logits
    assert jnp.max(jnp.abs(unscaled - run(config, params, tokens).logits)) > 1e-3


def test_model_holds_causal_lm_params_with_their_axes():
    config = CONFIGS["qwen2"]
    model = nn.Model(config, rngs=nnx.Rngs(params=0))
    tokens = tokens_of("qwen2", 2, 12)
    assert jax.eval_shape(model, tokens).logits.shape == (2, 12, 64)
    graph, state = nnx.split(model)
    assert jax.tree.structure(nnx.to_pure_dict(state)["weights"]) == jax.tree.structure(nn.param_shapes(config))
    variables = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable))
    for variable in variables:
        assert len(variable.get_metadata()["axes"]) == variable.get_value().ndim
    params = nnx.to_pure_dict(state)
    up = params["weights"]["layers"]["mlp"]["up"]
    up["kernel"], _ = _wrap(up["kernel"], jax.random.key(0))
    assert isinstance(nnx.merge(graph, params).params["layers"]["mlp"]["up"]["kernel"], LowRank)
    with pytest.raises(ValueError, match="expected params, or rngs"):
        nn.Model(config)


def test_init_params_depend_on_names_only_and_param_axes_cover_all():
    for config in CONFIGS.values():
        params, axes = jax.eval_shape(lambda c=config: nn.init_params(jax.random.key(0), c)), nn.param_axes(config)
        assert params == nn.param_shapes(config)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, names: len(names) == x.ndim, params, axes)))
        assert nn.count_params(config) == sum(x.size for x in jax.tree.leaves(params))
    configs = (CONFIGS["llama"].replace(num_layers=1), CONFIGS["llama"])
    shallow, deep = jax.jit(lambda key: [nn.init_params(key, c)["embed"] for c in configs])(jax.random.key(0))
    chex.assert_trees_all_equal(shallow, deep)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (nn.CausalLMConfig.gpt2(), 124_439_808),
        (nn.CausalLMConfig.gpt2(50257, 1024, 24, 16), 354_823_168),
        (nn.CausalLMConfig.llama3("8b"), 8_030_261_248),
        (nn.CausalLMConfig.llama3("70b"), 70_553_706_496),
        (nn.CausalLMConfig.mistral("7b"), 7_241_732_096),
        (nn.CausalLMConfig.qwen2("7b"), 7_615_616_512),
        (nn.CausalLMConfig.qwen2("0.5b"), 494_032_768),
    ],
)
def test_count_params_of_causal_lm_presets_is_as_published(config, count):
    assert nn.count_params(config) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of the 4 query heads, got 3"),
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        ({"family": "bert"}, "family: expected one of"),
        ({"norm": "batch"}, "norm: expected one of"),
        ({"activation": "sin"}, "activation: expected one of"),
        ({"windows": (4,)}, "windows: expected one for each of 3 layers, got 1"),
        ({"windows": (4, 0, 4)}, "windows: expected at least 1 token"),
        ({"head_dim": 7}, "even number, got 7"),
    ],
)
def test_causal_lm_config_refuses_contradictions(changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS["llama"].replace(**changes)


def test_causal_lm_config_refuses_unknown_sizes():
    with pytest.raises(ValueError, match="expected one of \\['70b', '8b'\\] for llama3, got '9b'"):
        nn.CausalLMConfig.llama3("9b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": np.zeros((1, 33), np.int32)}, "33 positions, the model has 32"),
        ({"tokens": np.zeros((5,), np.int32)}, "expected \\[batch, length\\]"),
        (
            {"attention_mask": np.ones((1, 4))},
            "expected the shape \\(1, 5\\) of tokens, got \\(1, 4\\)",
        ),
        ({"slots": 4}, "cache: 4 slots for 1 sequences can't take tokens"),
        (
            {"slots": 8, "segment_ids": np.zeros((1, 5), np.int32)},
            "a cache does not support packed texts",
        ),
    ],
)
def test_causal_lm_apply_refuses_wrong_shapes(options, message):
    options = {"tokens": np.zeros((1, 5), np.int32), **options}
    if "slots" in options:
        options["cache"] = nn.init_cache(CONFIGS["llama"], 1, options.pop("slots"))
    with pytest.raises(ValueError, match=message):
        nn.causal_lm_apply(CONFIGS["llama"], params_of("llama"), **options)


def test_check_tokens_refuses_tokens_outside_the_vocabulary():
    with pytest.raises(TypeError, match="expected integers, got float32"):
        nn.causal_lm_apply(CONFIGS["llama"], params_of("llama"), jnp.zeros((1, 5)))
    nn.check_tokens(np.array([[0, 63]]), 64)
    with pytest.raises(ValueError, match="64 at \\(0, 1\\) is outside the vocabulary of 64 tokens"):
        nn.check_tokens(np.array([[0, 64]]), 64)
    with pytest.raises(ValueError, match="-1 at \\(2,\\)"):
        nn.check_tokens([1, 2, -1], 64)
    with pytest.raises(TypeError, match="integers, got float64"):
        nn.check_tokens([0.5], 64)
    # Under jit, where no value can be looked at, a wrong token is not passed off as another one.
    table = jnp.ones((4, 2))
    assert np.isnan(nn.embed(jnp.array([4, -1]), table)).all()
    assert nn.init_cache(CONFIGS["llama"], 2, 3).slots == 3
    with pytest.raises(ValueError, match="at least 1 sequence"):
        nn.init_cache(CONFIGS["llama"], 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [6, 7])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_causal_lm_apply_computes_float64_in_float64(x64, name, cut):
    config, tokens = CONFIGS[name], tokens_of(name, 2, 12)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params_of(name))
    exact = run(config, params, tokens)
    assert exact.logits.dtype == jnp.float64
    parts = [run(config, params, tokens[:, :cut], cache=nn.init_cache(config, 2, 12, jnp.float64))]
    parts.append(run(config, params, tokens[:, cut:], cache=parts[0].cache))
    np.testing.assert_allclose(jnp.concatenate([p.logits for p in parts], axis=1), exact.logits, atol=1e-12)
    rounded = run(config, jax.tree.map(lambda x: x.astype(jnp.float32), params), tokens).logits
    np.testing.assert_allclose(rounded, exact.logits, atol=1e-4)
    made = jax.eval_shape(lambda p, t: nn.generate(config, p, t, max_new_tokens=3), params, tokens[:, :4])
    assert made.tokens.dtype == jnp.int32


def test_causal_lm_apply_works_under_vmap():
    config, tokens = CONFIGS["llama"], tokens_of("llama", 2, 12)
    both = jax.tree.map(lambda *x: jnp.stack(x), params_of("llama"), params_of("llama", 5))
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(jax.vmap(lambda p: nn.causal_lm_apply(config, p, tokens, options=FULL).logits))(both)
    np.testing.assert_allclose(logits[1], run(config, params_of("llama", 5), tokens).logits, atol=1e-5)
