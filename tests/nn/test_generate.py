import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import nn

from .lm import CONFIGS, FAMILIES, padded, params_of, read_again, tokens_of


def prompts_of(name):
    """Three prompts of unequal lengths, one of them longer than the windows."""
    rows = np.asarray(tokens_of(name, 3, 9))
    return [rows[0], rows[1, :2], rows[2, :6]]


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_equals_generation_without_a_cache(name):
    config, params, prompts = CONFIGS[name], params_of(name), prompts_of(name)
    expected = read_again(config, params, prompts, 12)
    for side in ("left", "right"):
        tokens, mask = padded(prompts, side)
        with jax.default_matmul_precision("highest"):
            made = nn.generate(config, params, tokens, max_new_tokens=12, attention_mask=mask)
        np.testing.assert_array_equal(made.tokens, expected)
        np.testing.assert_array_equal(made.lengths, 12)


@pytest.mark.slow
def test_generate_pads_after_the_end_token():
    config, params, tokens = CONFIGS["llama"], params_of("llama"), tokens_of("llama", 4, 6)
    free = np.asarray(nn.generate(config, params, tokens, max_new_tokens=10).tokens)
    eos = int(free[0, 3])
    made = nn.generate(config, params, tokens, max_new_tokens=10, eos_tokens=(eos,), pad_token=63)
    for row, cut, length in zip(free, np.asarray(made.tokens), np.asarray(made.lengths), strict=True):
        end = int(np.argmax(row == eos)) + 1 if (row == eos).any() else 10
        assert length == end
        np.testing.assert_array_equal(cut[:end], row[:end])
        np.testing.assert_array_equal(cut[end:], 63)


@pytest.mark.slow
def test_generate_ends_at_the_first_of_several_end_tokens():
    config, params, tokens = CONFIGS["llama"], params_of("llama"), tokens_of("llama", 1, 6)
    free = np.asarray(nn.generate(config, params, tokens, max_new_tokens=10).tokens)[0]
    for ends in (int(free[4]), (63, int(free[4])), [int(free[4]), int(free[2])]):
        made = nn.generate(config.replace(eos_tokens=(63,)), params, tokens, max_new_tokens=10, eos_tokens=ends)
        assert int(made.lengths[0]) == 1 + min(int(np.argmax(free == end)) for end in np.ravel(ends) if end in free)


def test_generate_samples_by_its_key_and_is_greedy_at_low_temperature():
    config, params, tokens = CONFIGS["gpt2"], params_of("gpt2"), tokens_of("gpt2", 2, 6)
    draw = lambda seed, t, p=1.0: np.asarray(  # noqa: E731
        nn.generate(config, params, tokens, max_new_tokens=8, key=jax.random.key(seed), temperature=t, top_p=p).tokens
    )
    np.testing.assert_array_equal(draw(0, 1.0), draw(0, 1.0))
    assert (draw(0, 1.0) != draw(1, 1.0)).any()
    greedy = nn.generate(config, params, tokens, max_new_tokens=8).tokens
    np.testing.assert_array_equal(draw(0, 1e-4), greedy)
    np.testing.assert_array_equal(draw(0, 1.0, 1e-6), greedy)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.05, 1.0))
def test_keep_top_p_keeps_the_smallest_nucleus(seed, top_p):
    logits = 2 * jax.random.normal(jax.random.key(seed), (3, 11))
    kept = np.asarray(nn.keep_top_p(logits, top_p))
    for row, out in zip(np.asarray(jax.nn.softmax(logits)), kept, strict=True):
        order = np.argsort(-row)
        count = int(np.searchsorted(np.cumsum(row[order]), top_p - 1e-6)) + 1
        assert np.isfinite(out[order[: min(count, 11) - 1]]).all()
        assert np.isfinite(out).sum() in (min(count, 11) - 1, min(count, 11), min(count, 11) + 1)
        assert np.isfinite(out[order[0]])


@pytest.mark.slow
def test_generate_works_in_bfloat16():
    config, params, tokens = CONFIGS["qwen2"], params_of("qwen2"), tokens_of("qwen2", 2, 6)
    made = nn.generate(config, params, tokens, max_new_tokens=5, dtype=jnp.bfloat16)
    assert made.tokens.shape == (2, 5)
    assert made.tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 27}, "27 after a prompt of 6 exceed the model's 32 positions"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an integer, got 2.5"),
        ({"tokens": np.zeros((2, 40), np.int32)}, "a prompt of 40 leaves none of the model's 32 positions"),
        ({"temperature": float("nan")}, "temperature >= 0, finite .*, got nan"),
        ({"temperature": float("inf")}, "temperature >= 0, finite .*, got inf"),
        ({"temperature": 1e-30}, "not between 0 and 1e-6, got 1e-30"),
        ({"top_p": float("nan")}, "0 < top_p <= 1, got nan"),
        ({"eos_tokens": (2, 64)}, "eos_tokens: expected tokens below vocab_size 64"),
        ({"eos_tokens": -1}, "eos_tokens: expected tokens below vocab_size 64"),
        ({"temperature": 1.0}, "needs a random key, got None"),
        ({"tokens": np.zeros((2, 0), np.int32)}, "expected prompts"),
        ({"attention_mask": np.ones((2, 5))}, "attention_mask: expected the shape"),
    ],
)
def test_generate_refuses_options_out_of_range(options, message):
    arguments = {"tokens": tokens_of("llama", 2, 6), "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=message):
        nn.generate(CONFIGS["llama"], params_of("llama"), **arguments)
