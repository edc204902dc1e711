import jax
import numpy as np
import pytest

from subspace_jax import nn

from .lm import CONFIGS, padded, params_of, tokens_of


def test_stream_yields_the_tokens_of_generate_and_ends_where_all_texts_have_ended():
    config, params = CONFIGS["llama"], params_of("llama")
    rows = np.asarray(tokens_of("llama", 2, 6))
    tokens, mask = padded([rows[0], rows[1, :3]], "left")
    options = {"max_new_tokens": 6, "attention_mask": mask, "pad_token": 63}
    free = nn.generate(config, params, tokens, **options)
    eos = tuple(int(token) for token in free.tokens[:, 2])
    made = nn.generate(config, params, tokens, eos_tokens=eos, **options)
    streamed = np.stack(list(nn.stream(config, params, tokens, eos_tokens=eos, **options)), axis=1)
    assert streamed.shape[1] == int(np.max(made.lengths)) < 6
    np.testing.assert_array_equal(streamed, made.tokens[:, : streamed.shape[1]])


@pytest.mark.slow
def test_stream_samples_by_the_key_as_generate_does():
    config, params, tokens = CONFIGS["gpt2"], params_of("gpt2"), tokens_of("gpt2", 2, 6)
    options = {"max_new_tokens": 4, "key": jax.random.key(3), "temperature": 0.9, "top_p": 0.9}
    streamed = np.stack(list(nn.stream(config, params, tokens, **options)), axis=1)
    np.testing.assert_array_equal(streamed, nn.generate(config, params, tokens, **options).tokens)


def test_stream_refuses_options_before_the_first_token():
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        nn.stream(CONFIGS["llama"], params_of("llama"), tokens_of("llama", 2, 6), max_new_tokens=0)
