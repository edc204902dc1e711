"""CoOp through CLIP's text tower."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subspace_jax import interop, nn
from subspace_jax.represent import few_shot_survey as fs

CLIP = pathlib.Path(__file__).parents[1] / "golden" / "interop_vision" / "clip"


@pytest.fixture(scope="module")
def clip():
    """A tiny CLIP, three texts with two placeholders behind the first token, and where they end."""
    config, params = interop.load_dual(CLIP)
    ids = np.random.default_rng(0).integers(2, config.text.vocab_size - 2, (3, 8))
    ids[ids == config.text.end_token] += 1
    ends = np.array([5, 6, 5])
    for row, end in zip(ids, ends, strict=True):
        row[end:] = config.text.end_token
    return config, params, jnp.asarray(ids, jnp.int32), jnp.asarray(ends)


def test_encode_prompts_of_a_text_s_own_tokens_is_encode_text(clip):
    config, params, ids, ends = clip
    embeddings = params["text"]["embed"]["embedding"][ids]
    run = jax.jit(lambda params, x, ids: (_encode(config, params, ends, x), nn.encode_text(config, params, ids)))
    chex.assert_trees_all_close(*run(params, embeddings, ids), atol=1e-5)
    with pytest.raises(ValueError, match="embeddings, ends: expected"):
        nn.encode_prompts(config, params, embeddings[:, :, 1:], ends)
    with pytest.raises(ValueError, match="positions, the tower has"):
        nn.encode_prompts(config, params, jnp.tile(embeddings, (1, 100, 1)), ends)


@pytest.mark.slow
@pytest.mark.parametrize("per_class", [False, True])
def test_fit_prompts_moves_the_context_alone_and_lowers_the_loss(clip, per_class):
    config, params, ids, ends = clip
    embeddings = params["text"]["embed"]["embedding"][ids]
    encode = jax.tree_util.Partial(functools.partial(_encode, config), params, ends)
    start = fs.CoOpPrompts(
        embeddings, np.array([2, 3, 2]), num_context=2, per_class=per_class, position="middle", rngs=nnx.Rngs(0)
    )
    assert start.context.shape == ((3, 2, config.text.width) if per_class else (2, config.text.width))
    # Near the texts' own vectors, moved by what all have in common.
    labels = np.tile(np.arange(3), 4)
    features = jax.jit(lambda encode, x: encode(x))(encode, start(embeddings))[labels] + 0.3 * jax.random.normal(
        jax.random.key(1), (12, 1)
    )
    order = np.tile(np.arange(12), (10, 1))
    shots = fs.Shots(features, labels)
    trained, losses = fs.fit_prompts(start, encode, embeddings, shots, order, scale=10.0)
    assert losses[-1] < losses[0]
    prompts = trained(embeddings)
    np.testing.assert_array_equal(prompts[:, 0], embeddings[:, 0])
    # Start, context, name of two tokens, context.
    np.testing.assert_array_equal(prompts[0, 2:4], embeddings[0, 3:5])
    assert not np.array_equal(trained.context, start.context)


def _encode(config, params, ends, prompts):
    return nn.encode_prompts(config, params, prompts, ends)
