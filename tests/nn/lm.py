"""Small language models for tests: one of each family, and what a test does with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import nn
from subspace_jax.nn.params import map_specs

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "max_length": 32}
WIDE = {**SMALL, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 32}

CONFIGS = {
    "gpt2": nn.CausalLMConfig.gpt2(**SMALL),
    "llama": nn.CausalLMConfig.llama3(**WIDE),
    "mistral": nn.CausalLMConfig.mistral(**WIDE).replace(windows=(5,) * 3),
    # Layers that differ in what they see, biases, and a tied head.
    "qwen2": nn.CausalLMConfig.qwen2("0.5b", **WIDE).replace(windows=(None, 4, None)),
    "qwen3": nn.CausalLMConfig.qwen3(**WIDE),
    # Caps that scores and logits reach, and layers with rotary positions of their own.
    "gemma2": nn.CausalLMConfig.gemma2(**WIDE, score_dim=12, score_softcap=2.0, logit_softcap=5.0).replace(
        windows=(5, None, 5)
    ),
    "gemma3": nn.CausalLMConfig.gemma3(**{**WIDE, "num_kv_heads": 1}, local_rope=nn.Rope(100.0)).replace(
        windows=(5, 5, None)
    ),
}

# Learned positions, layer norm and fused kernels; rotary positions, windows that differ, biases and a tied head.
FAMILIES = ["gpt2", "qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "llama"))]


@functools.cache
def params_of(name, seed=0):
    """Parameters large enough that tokens are told apart, biases and norms included; drawn without a compiler."""
    draw = np.random.default_rng(seed).standard_normal
    specs = nn.param_specs(CONFIGS[name])
    return map_specs(lambda spec: jnp.asarray(spec.value + 0.2 * draw(spec.shape), jnp.float32), specs)


def tokens_of(name, *shape, seed=2):
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIGS[name].vocab_size, jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("options", "capture_hidden", "dtype", "logits_dtype"))
def run(config, params, tokens, **options):
    with jax.default_matmul_precision("highest"):
        return nn.causal_lm_apply(config, params, tokens, **options)


def next_token_loss(config, params, tokens, **options):
    with jax.default_matmul_precision("highest"):
        logits = nn.causal_lm_apply(config, params, tokens, logits_dtype=jnp.float32, **options).logits
    scores = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))


def read_again(config, params, prompts, count):
    """Greedy continuation without a cache: for each token the whole text is read again, from its first slot."""
    total = max(map(len, prompts)) + count
    rows = np.zeros((len(prompts), total), np.int32)
    lengths = np.array([len(p) for p in prompts])
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    for _ in range(count):
        mask = np.arange(total)[None] < lengths[:, None]
        logits = np.asarray(run(config, params, jnp.asarray(rows), attention_mask=jnp.asarray(mask)).logits)
        rows[np.arange(len(rows)), lengths] = logits[np.arange(len(rows)), lengths - 1].argmax(-1)
        lengths += 1
    return np.stack([row[n - count : n] for row, n in zip(rows, lengths, strict=True)])


def padded(prompts, side):
    """Prompts side by side, and the mask of what is not padding."""
    width = max(map(len, prompts))
    rows, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), np.int32)
    for row, valid, prompt in zip(rows, mask, prompts, strict=True):
        place = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        row[place], valid[place] = prompt, 1
    return jnp.asarray(rows), jnp.asarray(mask)
