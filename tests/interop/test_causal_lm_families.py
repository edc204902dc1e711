"""Qwen3, Gemma 2 and Gemma 3 against transformers, and their configs.

The folders ``tests/golden/interop/{qwen3, gemma2, gemma3}`` hold random models of three layers, of which transformers
5.24.0 (torch 2.13.0, eager attention, float32, CPU) computed ``io.npz``: logits and hidden states of two rows of 14
tokens, and logits where the last five tokens of the second row are padding.  Weights are normal numbers of standard
deviation 0.25, around 1 for the norms of Qwen3, rounded to bfloat16.
"""

import copy
import functools
import json
import math
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop, nn

from .conftest import tensors_of

FAMILIES = ("qwen3", "gemma2", "gemma3")
each = pytest.mark.parametrize("name", FAMILIES)

SIZES = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
QWEN3 = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2, "head_dim": 8}
GEMMA2 = {**QWEN3, "model_type": "gemma2"}
GEMMA3 = {**QWEN3, "model_type": "gemma3_text"}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capture_hidden", "dtype", "logits_dtype"))
def run(config, params, tokens, **options):
    with jax.default_matmul_precision("highest"):
        return nn.causal_lm_apply(config, params, tokens, **options)


@each
def test_causal_lm_apply_gives_the_numbers_of_transformers_in_float32_and_bfloat16(name, checkpoint, expected):
    config, params = interop.load_causal_lm(checkpoint(name), dtype=jnp.float32)
    wanted = expected(name)
    tokens, mask = jnp.asarray(wanted["input_ids"], jnp.int32), jnp.asarray(wanted["attention_mask"])
    out = run(config, params, tokens, capture_hidden=True)
    np.testing.assert_allclose(out.logits, wanted["logits"], atol=1e-4)
    np.testing.assert_allclose(out.hidden, wanted["hidden"], atol=1e-4)
    masked = np.asarray(run(config, params, tokens, attention_mask=mask).logits)
    np.testing.assert_allclose(masked[mask > 0], wanted["logits_masked"][mask > 0], atol=1e-4)
    rounded = run(config, params, tokens, dtype=jnp.bfloat16, logits_dtype=jnp.float32).logits
    # A few roundings of 2^-9 in each of three blocks.
    assert np.max(np.abs(rounded - wanted["logits"])) < 0.04 * np.max(np.abs(wanted["logits"]))


@each
def test_save_causal_lm_writes_what_load_causal_lm_read(name, checkpoint, tmp_path):
    config, params = interop.load_causal_lm(checkpoint(name))
    interop.save_causal_lm(tmp_path / "out", config, params)
    again, read = interop.load_causal_lm(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(params, read, strict=True)
    original, written = tensors_of(checkpoint(name)), tensors_of(tmp_path / "out")
    assert original.keys() == written.keys()
    assert all(original[key].tobytes() == written[key].tobytes() for key in original)


@each
def test_config_to_hf_keeps_the_fields_of_transformers(name, checkpoint):
    fields = json.loads((checkpoint(name) / "config.json").read_text())
    written = interop.config_to_hf(interop.read_config(checkpoint(name)), fields["dtype"])
    # Those of training and of a transformers version aside.
    names = (written.keys() & fields.keys()) - {"max_window_layers"}
    assert {key: written[key] for key in names} == {key: fields[key] for key in names}
    left = {"attention_dropout", "initializer_range", "transformers_version", "_sliding_window_pattern"}
    assert fields.keys() - written.keys() <= left | {"use_bidirectional_attention"}


def test_folders_without_optional_fields_have_the_defaults_of_their_architecture():
    config = interop.config_from_hf(
        {key: v for key, v in QWEN3.items() if key not in ("num_key_value_heads",)}
        | {"num_attention_heads": 32, "hidden_size": 64, "head_dim": None}
    )
    assert (config.num_kv_heads, config.head_dim, config.max_length, config.tied) == (32, 128, 32768, False)
    gemma2 = interop.config_from_hf(GEMMA2)
    assert gemma2.windows == (4096, None, 4096)
    assert (gemma2.score_softcap, gemma2.logit_softcap, gemma2.score_dim, gemma2.tied) == (50.0, 30.0, 256.0, True)
    assert (gemma2.bos_token, gemma2.eos_tokens, gemma2.pad_token, gemma2.max_length) == (2, (1,), 0, 8192)
    gemma3 = interop.config_from_hf({**GEMMA3, "num_hidden_layers": 7, "sliding_window": 9})
    assert gemma3.windows == (9,) * 5 + (None, 9)
    assert (gemma3.rope, gemma3.local_rope) == (nn.Rope(1e6), nn.Rope())
    assert (gemma3.score_softcap, gemma3.logit_softcap, gemma3.max_length) == (None, None, 131072)
    assert interop.config_from_hf({**GEMMA3, "sliding_window_pattern": 2}).windows == (4096, None, 4096)


PRESETS = [
    nn.CausalLMConfig.qwen3("0.6b", eos_tokens=(3, 4)),
    nn.CausalLMConfig.qwen3("8b", qkv_bias=True, out_bias=True, windows=(None,) * 30 + (64,) * 6),
    nn.CausalLMConfig.gemma2("2b"),
    nn.CausalLMConfig.gemma2("9b", score_dim=144.0, logit_softcap=None, tied=False),
    nn.CausalLMConfig.gemma3("1b"),
    nn.CausalLMConfig.gemma3("270m", windows=None, local_rope=None),
    nn.CausalLMConfig.gemma3("1b", rope=nn.Rope(1e6, "linear", 8.0), local_rope=nn.Rope(5e3)),
    nn.CausalLMConfig.llama3("8b", max_length=65536, rope=nn.Rope(kind="yarn", factor=8.0, original_length=8192)),
    nn.CausalLMConfig.mistral(
        max_length=32768,
        rope=nn.Rope(
            kind="yarn", factor=2.0, original_length=8192, truncate=False, attention_factor=1.1, beta_fast=8.0
        ),
    ),
    nn.CausalLMConfig.qwen2("7b", max_length=65536, rope=nn.Rope(1e6, "dynamic", 2.0, original_length=32768)),
]


@pytest.mark.parametrize("config", PRESETS, ids=range(len(PRESETS)))
def test_config_to_hf_writes_every_config_of_the_families_and_scalings(config):
    fields = json.loads(json.dumps(interop.config_to_hf(config)))
    assert interop.config_from_hf(fields) == config
    for spelling in (("rope_theta", "rope_scaling", "rope_local_base_freq"), ("rope_parameters",)):
        assert interop.config_from_hf({k: v for k, v in fields.items() if k not in spelling}) == config


def test_config_from_hf_extends_the_longest_sequence_of_scaled_positions():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = interop.config_from_hf({**QWEN3, "max_position_embeddings": 40960, "rope_scaling": yarn})
    assert (config.max_length, config.rope) == (131072, nn.Rope(kind="yarn", factor=4.0, original_length=32768))
    # Without a factor it is the ratio of both lengths.
    ratio = {"rope_type": "yarn", "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = interop.config_from_hf({**QWEN3, "max_position_embeddings": 16384, "rope_parameters": ratio})
    assert (config.max_length, config.rope.factor, config.rope.magnitude) == (16384, 4.0, 1.0)
    dynamic = {"type": "dynamic", "factor": 2.0}
    config = interop.config_from_hf({**QWEN3, "max_position_embeddings": 4096, "rope_scaling": dynamic})
    assert (config.max_length, config.rope.original_length) == (8192, 4096)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**GEMMA3, "model_type": "gemma3"}, "'gemma3', of text and images, is not supported; its text model is"),
        ({**GEMMA3, "model_type": "gemma3n"}, "model_type: 'gemma3n' is not supported; expected one of"),
        ({**QWEN3, "model_type": "qwen3_moe"}, "model_type: 'qwen3_moe' is not supported"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention: expected false"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected null for 'gemma3_text'"),
        ({**GEMMA2, "attn_logit_softcapping": 0}, "attn_logit_softcapping: expected a number in"),
        ({**GEMMA2, "final_logit_softcapping": "30"}, "final_logit_softcapping: expected a number in"),
        ({**GEMMA2, "query_pre_attn_scalar": None}, "query_pre_attn_scalar: expected a number"),
        ({**GEMMA2, "sliding_window": None}, "sliding_window: expected a positive integer for layers of"),
        ({**GEMMA2, "layer_types": ["full_attention"] * 2}, "layer_types: expected 3 of"),
        ({**GEMMA3, "layer_types": ["chunked_attention"] * 3}, "layer_types: expected 3 of"),
        ({**GEMMA3, "sliding_window_pattern": 0}, "sliding_window_pattern: expected a positive integer"),
        ({**GEMMA2, "hidden_activation": "swiglu"}, "hidden_activation: 'swiglu' is not supported"),
        ({**GEMMA3, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: expected 'full_attention' and"),
        ({**GEMMA3, "rope_local_base_freq": "x"}, "rope_local_base_freq: expected a number"),
        (
            {**QWEN3, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters: settings for each kind of layer are not supported",
        ),
        ({**QWEN3, "rope_scaling": {"type": "yarn"}}, r"rope_type 'yarn' needs \['factor'\]"),
        ({**QWEN3, "rope_scaling": {"type": "dynamic"}}, r"rope_type 'dynamic' needs \['factor'\]"),
        ({**QWEN3, "rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate: expected true or"),
        ({**QWEN3, "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 40}}, "0 < beta_slow < beta_fast"),
        ({**QWEN3, "rope_scaling": {"type": "yarn", "factor": 1e9}}, "original length times factor: expected at most"),
        ({**QWEN3, "rope_scaling": {"type": "dynamic", "factor": 0.5}}, "a factor of at least 1 for dynamic, got 0.5"),
        ({**QWEN3, "rope_scaling": {"type": "longrope"}}, "rope_type: 'longrope' is not supported; expected one of"),
        ({**QWEN3, "rope_scaling": {"type": ["yarn"]}}, "rope_type: .* is not supported"),
    ],
)
def test_config_from_hf_refuses_variants_that_are_not_supported(fields, message):
    with pytest.raises(ValueError, match=message):
        interop.config_from_hf(fields)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
SHARES = {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0, "truncate": True, "rope_theta": 1e4}
ANY = ("", "abc", [], [1, "a"], {}, {"a": 1}, None, True, False, math.nan, math.inf, -1, 0, 1e300, 2**70, 1.5, 10**12)


def places(fields, path=()):
    """Every field, those of nested objects included."""
    for name, value in fields.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in FAMILIES),
        ("qwen3", {"rope_parameters": {**YARN, **SHARES}}),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("gemma3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {**YARN, "rope_theta": 100.0}}}),
    ],
)
def test_config_from_hf_refuses_any_value_of_a_field_or_reads_what_config_to_hf_writes(name, changes, checkpoint):
    base = {**json.loads((checkpoint(name) / "config.json").read_text()), **changes}
    for path in places(base):
        for value in ANY:
            fields = copy.deepcopy(base)
            functools.reduce(operator.getitem, path[:-1], fields)[path[-1]] = value
            try:
                config = interop.config_from_hf(fields)
            except ValueError:
                continue
            assert interop.config_from_hf(interop.config_to_hf(config)) == config, (path, value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (nn.CausalLMConfig.gemma2("2b", qk_norm=True), r"'gemma2' can't express this config: \['qk_norm'\]"),
        (nn.CausalLMConfig.llama3("8b", logit_softcap=9.0), r"'llama' can't express this config: \['logit_softcap'\]"),
        (
            nn.CausalLMConfig.llama3("8b", rope=nn.Rope(kind="dynamic", factor=2.0, original_length=2048)),
            r"can't express this config: \['max_length'\]",
        ),
    ],
)
def test_config_to_hf_refuses_what_the_family_has_no_field_for(config, message):
    with pytest.raises(ValueError, match=message):
        interop.config_to_hf(config)


def adapted(folder):
    """A model with an adapter of each projection."""
    config, params = interop.load_causal_lm(folder, dtype=jnp.float32)
    settings = {"re:layers/(attn|mlp)/.*": adapters.LoRA(2, 4.0)}
    trainable = adapters.init(jax.random.key(0), params, settings)
    return config, params, settings, jax.tree.map(lambda x: x + 0.1, trainable)


@pytest.mark.slow
def test_save_peft_adapter_names_every_projection_of_gemma(checkpoint, tmp_path):
    config, _, settings, trainable = adapted(checkpoint("gemma3"))
    interop.save_peft_adapter(tmp_path / "adapter", config, trainable, settings)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    targets = {module.split(".")[-1] for module in fields["target_modules"]}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    again = interop.load_peft_adapter(tmp_path / "adapter", config)
    chex.assert_trees_all_close(again.trainable, trainable, atol=1e-7)


@pytest.mark.slow
@each
def test_bound_adapters_of_all_projections_equal_merged_ones(name, checkpoint):
    config, params, settings, trainable = adapted(checkpoint(name))
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    bound = run(config, adapters.bind(params, trainable, settings), tokens).logits
    assert jnp.max(jnp.abs(bound - run(config, params, tokens).logits)) > 1e-2
    merged = adapters.merge(params, trainable, settings)
    np.testing.assert_allclose(run(config, merged, tokens).logits, bound, atol=1e-4)
