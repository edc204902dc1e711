"""Rotary scaling by YaRN and dynamic NTK.

``tests/golden/interop/rope_scaling`` holds what transformers 5.24.0 (torch 2.13.0, float32, CPU) computes for the
settings in ``settings.json``: frequencies, the factor of cosine and sine, and every fourth position's logits of the
golden Llama for a text of 30 tokens and for its first 12.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn

from ..variants import rest_slow
from .lm import CONFIGS, padded, params_of, run, tokens_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "interop"
SETTINGS = json.loads((GOLDEN / "rope_scaling" / "settings.json").read_text())
YARN = nn.Rope(kind="yarn", factor=4.0, original_length=16)
DYNAMIC = nn.Rope(kind="dynamic", factor=4.0, original_length=8)


@pytest.fixture(scope="module")
def expected():
    """What transformers computes."""
    with np.load(GOLDEN / "rope_scaling" / "io.npz") as archive:
        return dict(archive)


def llama(name):
    """The config of the golden Llama with other rotary settings, read as from its folder."""
    fields = json.loads((GOLDEN / "llama" / "config.json").read_text())
    return interop.config_from_hf({**fields, **SETTINGS[name]})


@pytest.mark.parametrize("name", [name for name in SETTINGS if "dynamic" not in name])
def test_rope_frequencies_of_yarn_are_those_of_transformers(name, expected):
    config = llama(name)
    found = nn.rope_frequencies(config.rope, config.head_dim)
    np.testing.assert_allclose(found, expected[f"{name}/frequencies"], rtol=1e-6)
    assert config.rope.magnitude == pytest.approx(expected[f"{name}/magnitude"], rel=1e-12)


@pytest.mark.parametrize(("key", "length"), [("wide_dynamic", 2048), ("wide_dynamic_6000", 6000), ("wide_dynamic", 5)])
def test_rope_tables_of_dynamic_have_the_frequencies_of_transformers(key, length, expected):
    config = llama("wide_dynamic")
    cos, sin = nn.rope_tables(config.rope, 64, jnp.array([[1]]), jnp.array([[length]]))
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0, 0], expected[f"{key}/frequencies"], rtol=1e-5)


@pytest.mark.parametrize("name", rest_slow(["yarn", "yarn_all", "yarn_attention", "dynamic"], "yarn_all", "dynamic"))
def test_causal_lm_apply_gives_the_logits_of_transformers_with_scaled_positions(name, expected):
    config = llama(name)
    params = interop.load_causal_lm(GOLDEN / "llama", dtype=jnp.float32)[1]
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    logits = run(config, params, tokens).logits[:, ::4]
    np.testing.assert_allclose(logits, expected[f"{name}/logits"], atol=1e-4)
    # As right padding, the rest of a text does not count to its length.
    short = run(config, params, tokens, attention_mask=jnp.arange(30)[None] < 12).logits[:, :12:4]
    np.testing.assert_allclose(short, expected[f"{name}/short"], atol=1e-4)


def test_rope_of_dynamic_leaves_short_texts_unchanged():
    config, params, tokens = CONFIGS["llama"].replace(rope=nn.Rope()), params_of("llama"), tokens_of("llama", 1, 20)
    scaled = config.replace(rope=DYNAMIC)
    short = run(config, params, tokens[:, :8]).logits
    np.testing.assert_allclose(run(scaled, params, tokens[:, :8]).logits, short, atol=1e-6)
    long = run(scaled, params, tokens).logits
    assert jnp.max(jnp.abs(long[:, :8] - short)) > 1e-3


@pytest.mark.slow
def test_texts_of_a_row_are_scaled_by_their_own_lengths():
    config, params, tokens = CONFIGS["llama"].replace(rope=DYNAMIC), params_of("llama"), tokens_of("llama", 1, 20)
    packed = run(config, params, tokens, segment_ids=jnp.array([[0] * 7 + [1] * 13])).logits
    for part in (slice(0, 7), slice(7, 20)):
        np.testing.assert_allclose(packed[:, part], run(config, params, tokens[:, part]).logits, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rope", [DYNAMIC, YARN], ids=lambda rope: rope.kind)
def test_generate_with_scaled_positions_continues_as_without_a_cache(rope):
    config, params, count = CONFIGS["llama"].replace(rope=rope, eos_tokens=()), params_of("llama"), 9
    prompts = [[5, 9, 11, 3, 7, 20, 31], [40, 2, 8]]
    with jax.default_matmul_precision("highest"):
        tokens, mask = padded(prompts, "left")
        new = np.asarray(nn.generate(config, params, tokens, max_new_tokens=count, attention_mask=mask).tokens)
    # All tokens of a text are rotated as those of its final length, of which two are beyond the original one.
    rows, mask = padded([prompt + list(row) for prompt, row in zip(prompts, new, strict=True)], "right")
    lengths = jnp.array([len(prompt) + count for prompt in prompts])
    logits = run(config, params, rows, attention_mask=mask, text_lengths=lengths).logits
    for row, prompt, tokens in zip(np.asarray(logits), prompts, new, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 : len(prompt) + count - 1].argmax(-1), tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarn", "beta_fast": 1.0}, "0 < beta_slow < beta_fast for yarn, got 10000.0, 1.0 and 1.0"),
        ({"kind": "yarn", "theta": 1.0}, "theta > 1"),
        ({"kind": "yarn", "attention_factor": 0.0}, "original_length and attention_factor are positive"),
        ({"kind": "dynamic", "original_length": 0}, "original_length and attention_factor are positive"),
        ({"kind": "dynamic", "factor": 0.5}, "factor of at least 1 for dynamic, got 0.5"),
    ],
)
def test_rope_refuses_invalid_settings_of_scaling(fields, message):
    with pytest.raises(ValueError, match=message):
        nn.Rope(**fields)


def test_dynamic_rope_refuses_heads_of_one_pair_and_lengths_of_another_shape():
    with pytest.raises(ValueError, match="even number above 2, got 2"):
        nn.rope_frequencies(DYNAMIC, 2)
    tokens = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"text_lengths: expected shape \(2,\), got \(1,\)"):
        nn.causal_lm_apply(CONFIGS["llama"], params_of("llama"), tokens, text_lengths=jnp.array([9]))
