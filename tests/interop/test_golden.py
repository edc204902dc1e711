"""The golden checkpoints, against what the authors' code returns for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn

from .conftest import MODELS


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capture_hidden",))
def run(config, params, tokens, **options):
    with jax.default_matmul_precision("highest"):
        return nn.causal_lm_apply(config, params, tokens, **options)


def test_causal_lm_apply_gives_the_logits_and_hidden_states_of_transformers(model, checkpoint, expected):
    config, params = interop.load_causal_lm(checkpoint(model), dtype=jnp.float32)
    wanted = expected(model)
    tokens, mask = jnp.asarray(wanted["input_ids"], jnp.int32), jnp.asarray(wanted["attention_mask"])
    out = run(config, params, tokens, capture_hidden=True)
    np.testing.assert_allclose(out.logits, wanted["logits"], atol=1e-4)
    np.testing.assert_allclose(out.hidden, wanted["hidden"], atol=1e-4)
    valid = np.asarray(mask, bool)
    masked = np.asarray(run(config, params, tokens, attention_mask=mask).logits)
    np.testing.assert_allclose(masked[valid], wanted["logits_masked"][valid], atol=1e-4)
    assert np.all(np.isfinite(masked))


def test_causal_lm_apply_ignores_left_padding(model, checkpoint, expected):
    config, params = interop.load_causal_lm(checkpoint(model), dtype=jnp.float32)
    wanted = expected(model)
    tokens = jnp.roll(jnp.asarray(wanted["input_ids"], jnp.int32), 4, axis=1)
    mask = jnp.arange(tokens.shape[1])[None] >= jnp.array([4, 4])[:, None]
    out = np.asarray(run(config, params, tokens, attention_mask=mask).logits)
    np.testing.assert_allclose(out[:, 4:], wanted["logits"][:, :-4], atol=1e-4)
    assert np.all(np.isfinite(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    MODELS,
    indirect=True,
)
def test_generate_with_a_cache_gives_the_tokens_of_the_full_forward_pass(model, checkpoint, expected):
    config, params = interop.load_causal_lm(checkpoint(model), dtype=jnp.float32)
    prompt = np.asarray(expected(model)["input_ids"], np.int32)[:, :5]
    rows, count = np.pad(prompt, ((0, 0), (0, 14))), 14
    for n in range(5, 5 + count):
        # What stands to the right of a token does not reach it.
        rows[:, n] = np.asarray(run(config, params, jnp.asarray(rows)).logits)[:, n - 1].argmax(-1)
    with jax.default_matmul_precision("highest"):
        plain = nn.generate(config, params, jnp.asarray(prompt), max_new_tokens=count, eos_tokens=())
        padded = jnp.pad(jnp.asarray(prompt), ((0, 0), (3, 0)))
        mask = jnp.pad(jnp.ones(prompt.shape, jnp.int32), ((0, 0), (3, 0)))
        left = nn.generate(config, params, padded, max_new_tokens=count, attention_mask=mask, eos_tokens=())
    np.testing.assert_array_equal(plain.tokens, rows[:, 5:])
    np.testing.assert_array_equal(left.tokens, rows[:, 5:])


def test_transformers_reads_what_save_causal_lm_writes(model, checkpoint, expected, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = interop.load_causal_lm(checkpoint(model), dtype=jnp.float32)
    interop.save_causal_lm(tmp_path / "out", config, params, shard_bytes=40_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    wanted = expected(model)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(wanted["input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, wanted["logits"], atol=1e-4)
