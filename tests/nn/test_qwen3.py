"""Qwen3: queries and keys are normalized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import nn

from .lm import CONFIGS, padded, params_of, read_again, run, tokens_of


def test_qk_norm_makes_causal_lm_apply_independent_of_the_scale_of_queries_and_keys():
    config, params, tokens = CONFIGS["qwen3"].replace(norm_eps=1e-12), params_of("qwen3"), tokens_of("qwen3", 1, 12)
    attn = params["layers"]["attn"]
    larger = {name: {"kernel": factor * attn[name]["kernel"]} for name, factor in (("q", 4.0), ("k", 0.5))}
    changed = {**params, "layers": {**params["layers"], "attn": {**attn, **larger}}}
    logits = run(config, params, tokens).logits
    np.testing.assert_allclose(run(config, changed, tokens).logits, logits, atol=1e-5)
    without = run(config.replace(qk_norm=False), params, tokens).logits
    assert jnp.max(jnp.abs(without - logits)) > 1e-2


def test_generate_continues_as_qwen3_does_without_a_cache():
    config, params = CONFIGS["qwen3"].replace(eos_tokens=()), params_of("qwen3")
    prompts = [[5, 9, 11, 3, 7, 20, 31], [40, 2, 8]]
    tokens, mask = padded(prompts, "right")
    with jax.default_matmul_precision("highest"):
        new = nn.generate(config, params, tokens, max_new_tokens=8, attention_mask=mask)
    np.testing.assert_array_equal(new.tokens, read_again(config, params, prompts, 8))


@pytest.mark.parametrize(
    ("config", "count"),
    [(nn.CausalLMConfig.qwen3("0.6b"), 596_049_920), (nn.CausalLMConfig.qwen3("8b"), 8_190_735_360)],
)
def test_count_params_of_qwen3_presets_is_as_published(config, count):
    assert nn.count_params(config) == count
