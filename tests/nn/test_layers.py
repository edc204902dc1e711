"""Layers as a tuple: the same model as with stacks, in each way in which layers are run."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn

from .lm import CONFIGS, next_token_loss, params_of, run, tokens_of

VIT = nn.VisionTransformerConfig(
    "vit", (16, 16), 4, width=16, num_layers=3, num_heads=2, mlp_size=32, num_classes=8, drop_path=0.5
)


# The same matmuls, fused in another way by the compiler.
assert_close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_stack_layers_inverts_unstack_layers():
    params = {"tower": params_of("llama"), "scale": jnp.ones(3)}
    rules = {"attn/q": adapters.LoRA(rank=2, alpha=4.0)}
    params["tower"] = adapters.bind(params["tower"], adapters.init(jax.random.key(0), params["tower"], rules), rules)
    apart = nn.unstack_layers(params)
    assert len(apart["tower"]["layers"]) == 3
    again = nn.stack_layers(apart)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    chex.assert_trees_all_equal(again, params)
    assert nn.unstack_layers(apart) is not apart
    assert jax.tree.structure(nn.unstack_layers(apart)) == jax.tree.structure(apart)
    assert jax.tree.structure(nn.stack_layers(params)) == jax.tree.structure(params)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "qwen2"])
def test_causal_lm_apply_equals_itself_with_unstacked_layers(name):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 2, 12)
    expected = run(config, params, tokens, capture_hidden=True)
    got = run(config, nn.unstack_layers(params), tokens, capture_hidden=True)
    assert_close(got, expected)


@pytest.mark.slow
def test_causal_lm_apply_with_adapters_equals_itself_with_unstacked_layers():
    config, params, tokens = CONFIGS["llama"], params_of("llama"), tokens_of("llama", 2, 12)
    rules = {"attn/q": adapters.LoRA(rank=2, alpha=4.0), "mlp/up": adapters.DoRA(rank=2, alpha=4.0)}
    trainable = jax.tree.map(lambda x: x + 0.1, adapters.init(jax.random.key(0), params, rules))
    bound = adapters.bind(params, trainable, rules)
    assert_close(run(config, nn.unstack_layers(bound), tokens).logits, run(config, bound, tokens).logits)


@pytest.mark.slow
def test_generate_equals_itself_with_unstacked_layers():
    config, params, tokens = CONFIGS["qwen2"], params_of("qwen2"), tokens_of("qwen2", 2, 8)
    texts = [nn.generate(config, p, tokens, max_new_tokens=8).tokens for p in (params, nn.unstack_layers(params))]
    np.testing.assert_array_equal(*texts)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_gradients_equal_those_of_unstacked_layers(remat):
    config, params, tokens = CONFIGS["gpt2"], params_of("gpt2"), tokens_of("gpt2", 2, 12)
    grads = jax.jit(jax.grad(functools.partial(next_token_loss, config, options=nn.LayerOptions(remat=remat))))
    assert_close(nn.stack_layers(grads(nn.unstack_layers(params), tokens)), grads(params, tokens))


@pytest.mark.slow
def test_vision_transformer_apply_equals_itself_with_unstacked_layers():
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw(s.shape), s.dtype), nn.param_shapes(VIT))
    pixels = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    look = jax.jit(
        lambda params: nn.vision_transformer_apply(
            VIT, params, pixels, capture="all", train=True, key=jax.random.key(2)
        )
    )
    assert_close(look(nn.unstack_layers(params)), look(params))
