"""Gemma 2 and 3: what their blocks have that those of Llama don't."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import nn, train

from ..variants import rest_slow
from .lm import CONFIGS, next_token_loss, padded, params_of, read_again, run, tokens_of

BOTH = rest_slow(["gemma3", "gemma2"])


def test_rms_norm_with_an_offset_multiplies_by_one_more_and_rounds_the_product():
    x, scale = jax.random.normal(jax.random.key(0), (5, 16)), 0.3 * jax.random.normal(jax.random.key(1), (16,))
    np.testing.assert_allclose(nn.rms_norm(x, scale, 1e-6, offset=True), nn.rms_norm(x, 1 + scale, 1e-6), rtol=1e-6)
    rounded = nn.rms_norm(x.astype(jnp.bfloat16), scale, 1e-6, offset=True)
    wide = nn.rms_norm(x.astype(jnp.bfloat16).astype(jnp.float32), scale, 1e-6, offset=True)
    np.testing.assert_array_equal(rounded, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("length", rest_slow([7, 2048]))
def test_attention_with_a_softcap_bounds_scores_before_the_mask(length):
    shape = (1, length, 2, 4)
    query, key, value = (2 * jax.random.normal(jax.random.key(i), shape) for i in range(3))
    mixed = nn.attention(query, key, value, scale=0.7, softcap=1.5)
    scores = 0.7 * np.einsum("bthd,bshd->bhts", *(np.asarray(x, np.float64) for x in (query, key)))
    scores = np.where(np.tri(length, dtype=bool), 1.5 * np.tanh(scores / 1.5), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(mixed, np.einsum("bhts,bshd->bthd", weights, value), atol=1e-5)


def test_attention_by_cudnn_refuses_a_softcap():
    x = np.zeros((1, 2, 1, 8), np.float32)
    with pytest.raises(ValueError, match="'cudnn' does not support softcap"):
        nn.attention(x, x, x, softcap=1.0, implementation="cudnn")


@pytest.mark.slow
@pytest.mark.eight_devices
def test_sequence_attention_bounds_scores_as_attention_does():
    query, key, value = (2 * jax.random.normal(jax.random.key(i), (2, 16, 2, 4)) for i in range(3))
    attend = jax.jit(
        functools.partial(nn.sequence_attention(train.make_mesh(1, sequence=8), ("sequence",)), softcap=1.5)
    )
    mixed = nn.attention(query, key, value, softcap=1.5)
    np.testing.assert_allclose(attend(query, key, value), mixed, atol=1e-5)
    assert jnp.max(jnp.abs(mixed - nn.attention(query, key, value))) > 1e-2


def test_causal_lm_logits_are_bounded_by_their_softcap():
    config, params, tokens = CONFIGS["gemma2"], params_of("gemma2"), tokens_of("gemma2", 1, 12)
    out = run(config, params, tokens)
    plain = nn.causal_lm_logits(config.replace(logit_softcap=None), params, out.final)
    assert jnp.max(jnp.abs(plain)) > 2
    np.testing.assert_allclose(out.logits, 5 * np.tanh(np.asarray(plain) / 5), atol=1e-5)


def test_causal_lm_apply_divides_scores_by_the_root_of_score_dim():
    config, params, tokens = CONFIGS["gemma2"], params_of("gemma2"), tokens_of("gemma2", 1, 12)
    q = params["layers"]["attn"]["q"]["kernel"] * np.sqrt(8 / 12)
    attn = {**params["layers"]["attn"], "q": {"kernel": q}}
    scaled = {**params, "layers": {**params["layers"], "attn": attn}}
    expected = run(config.replace(score_dim=None), scaled, tokens).logits
    np.testing.assert_allclose(run(config, params, tokens).logits, expected, atol=1e-5)
    assert config.replace(score_dim=8).score_dim is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_causal_lm_apply_in_parts_with_a_cache_equals_one_pass_of_gemma(name):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 2, 14)
    whole = run(config, params, tokens, capture_hidden=True)
    first = run(config, params, tokens[:, :9], cache=nn.init_cache(config, 2, 16), capture_hidden=True)
    second = run(config, params, tokens[:, 9:], cache=first.cache, capture_hidden=True)
    hidden = jnp.concatenate([first.hidden, second.hidden], axis=2)
    np.testing.assert_allclose(hidden, whole.hidden, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_causal_lm_apply_separates_packed_texts_and_ignores_padding_of_gemma(name):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 1, 20)
    alone = [run(config, params, part).logits for part in (tokens[:, :12], tokens[:, 12:])]
    packed = run(config, params, tokens, segment_ids=jnp.array([[0] * 12 + [3] * 8])).logits
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=2e-5)
    masked = run(config, params, tokens, attention_mask=jnp.array([[0] * 12 + [1] * 8])).logits
    np.testing.assert_allclose(masked[:, 12:], alone[1], atol=2e-5)


@pytest.mark.parametrize("name", BOTH)
def test_generate_continues_as_gemma_does_without_a_cache(name):
    config, params = CONFIGS[name].replace(eos_tokens=()), params_of(name)
    prompts = [[5, 9, 11, 3, 7, 20, 31], [40, 2, 8]]
    tokens, mask = padded(prompts, "left")
    with jax.default_matmul_precision("highest"):
        new = nn.generate(config, params, tokens, max_new_tokens=8, attention_mask=mask)
    np.testing.assert_array_equal(new.tokens, read_again(config, params, prompts, 8))


def test_layers_with_a_window_have_the_rotary_positions_of_local_rope():
    config, params, tokens = CONFIGS["gemma3"], params_of("gemma3"), tokens_of("gemma3", 1, 12)
    everywhere = config.replace(windows=(5,) * 3)
    only = everywhere.replace(rope=config.local_rope, local_rope=None)
    np.testing.assert_allclose(run(everywhere, params, tokens).logits, run(only, params, tokens).logits, atol=1e-6)
    assert config.replace(windows=None).local_rope is None


@pytest.mark.slow
def test_other_layers_have_the_rotary_positions_of_rope():
    config, params, tokens = CONFIGS["gemma3"], params_of("gemma3"), tokens_of("gemma3", 1, 12)
    logits = run(config, params, tokens).logits
    for rope in ("rope", "local_rope"):
        other = run(config.replace(**{rope: nn.Rope(3.0)}), params, tokens).logits
        assert jnp.max(jnp.abs(other - logits)) > 1e-3
    apart = nn.causal_lm_apply(config, nn.unstack_layers(params), tokens).logits
    np.testing.assert_allclose(apart, logits, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_remat_of_causal_lm_apply_keeps_gradients_of_gemma(name):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 2, 12)
    plain, again = (
        jax.jit(jax.grad(functools.partial(next_token_loss, config, options=nn.LayerOptions(remat=remat))))(
            params, tokens
        )
        for remat in ("none", "full")
    )
    for expected, got in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert jnp.max(jnp.abs(expected)) > 0
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (nn.CausalLMConfig.gemma2("2b"), 2_614_341_888),
        (nn.CausalLMConfig.gemma2("9b"), 9_241_705_984),
        (nn.CausalLMConfig.gemma3("1b"), 999_885_952),
        (nn.CausalLMConfig.gemma3("270m"), 268_098_176),
    ],
)
def test_count_params_of_gemma_presets_is_as_published(config, count):
    assert nn.count_params(config) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_softcap": 0.0}, "score_softcap: expected a positive number, or None; got 0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap: expected a positive number"),
        ({"score_dim": 0}, "score_dim: expected a positive number"),
        ({"rope": None}, "local_rope: a model with learned positions has no rotary ones"),
        ({"norm": "offset"}, "norm: expected one of"),
    ],
)
def test_causal_lm_config_refuses_contradictions_of_gemma(changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS["gemma3"].replace(**changes)
