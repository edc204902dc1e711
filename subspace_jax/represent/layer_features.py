"""Features of every layer of a pretrained model: hidden states, averaged over tokens or positions."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import data, interop, nn, train
from subspace_jax.data.text import FileTokenizer, check_vocabulary
from subspace_jax.represent.features import FeatureModel, features_of_images, make_feature_step
from subspace_jax.represent.text_features import PADDING, features_of_texts

PyTree = Any


def layer_features_of_texts(
    path: str | os.PathLike,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = 512,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Means of the hidden states over the tokens of each text, by BERT or a causal language model.

    Args:
      path: Folder of Hugging Face, with ``tokenizer.json``.
      texts: The texts.
      batch_size: Texts of a batch.
      max_length: Most tokens of a text; those beyond are dropped.
      progress: Whether to show a progress bar.

    Returns:
      Features ``[texts, d]`` float32 by the number of the layer, from "0", the embeddings, to the last.

    Raises:
      FileNotFoundError: There is no such model, or no tokenizer.
      ValueError: The model is not supported or has no layers, or a text has no tokens.
    """
    mesh = train.make_mesh()
    replicated = NamedSharding(mesh, P())

    def shardings(shapes, _):
        return jax.tree.map(lambda _: replicated, shapes)

    tokenizer = FileTokenizer(path)
    before, after = (), ()
    if _is_causal(path):
        config, params = interop.load_causal_lm(path, shardings=shardings)
    else:
        encoder = interop.load_text_encoder(path, shardings=shardings)
        config, params = encoder.config, encoder.params
        if not isinstance(config, nn.BertConfig):
            raise ValueError(f"model: {path}: expected BERT or a causal language model, got embeddings without layers")
        before, after, max_length = [tokenizer.bos_id], [tokenizer.eos_id], min(max_length, encoder.max_length)
    check_vocabulary(tokenizer, config.vocab_size)

    def prepare(text):
        tokens = [*before, *tokenizer.encode(text)[: max_length - len(before) - len(after)], *after]
        if not tokens:
            raise ValueError(f"texts: expected texts with tokens, got {text!r}")
        return np.array(tokens, np.int32)

    def compute(params, inputs):
        mask = inputs != PADDING
        tokens = jnp.where(mask, inputs, 0)
        if isinstance(config, nn.BertConfig):
            hidden = nn.bert_apply(config, params, tokens, attention_mask=mask, capture="all").hidden
        else:
            hidden = nn.causal_lm_apply(
                config, params, tokens, attention_mask=mask, with_logits=False, capture_hidden=True
            ).hidden
        return jnp.concatenate([nn.mean_pool(state.astype(jnp.float32), mask) for state in hidden], axis=1)

    model = FeatureModel(make_feature_step(compute, mesh), params, prepare, mesh)
    found = features_of_texts(model, texts, batch_size=batch_size, progress=progress).features
    layers = config.num_layers + 1
    return _named(found, [found.shape[1] // layers] * layers)


def layer_features_of_images(
    path: str | os.PathLike, images: data.Images, *, batch_size: int = 64, progress: bool = False
) -> dict[str, np.ndarray]:
    """Means of the hidden states over the tokens or positions of each image, by a vision model.

    Args:
      path: Folder of Hugging Face or timm.
      images: The images.
      batch_size: Images of a batch.
      progress: Whether to show a progress bar.

    Returns:
      Features ``[images, d]`` float32 by the number of the layer or stage, from "0".

    Raises:
      FileNotFoundError: There is no such model, or no description of its image preparation.
      ValueError: The model is not supported, or an image can't be decoded.
    """
    mesh = train.make_mesh()
    prepare = data.ImageProcessor.from_json(path)
    replicated = NamedSharding(mesh, P())
    config, params = interop.load_vision(path, shardings=lambda shapes, _: jax.tree.map(lambda _: replicated, shapes))

    def states(params, pixels) -> list[jax.Array]:
        return nn.vision_apply(config, params, pixels, capture="all").hidden

    def compute(params: PyTree, pixels: jax.Array) -> jax.Array:
        means = [jnp.mean(s.astype(jnp.float32), axis=tuple(range(1, s.ndim - 1))) for s in states(params, pixels)]
        return jnp.concatenate(means, axis=1)

    model = FeatureModel(make_feature_step(compute, mesh), params, prepare, mesh)
    found = features_of_images(model, images, batch_size=batch_size, progress=progress).features
    pixels = prepare(images[0]["inputs"])
    one = jax.ShapeDtypeStruct((1, *pixels.shape), pixels.dtype)
    return _named(found, [s.shape[-1] for s in jax.eval_shape(states, params, one)])


def _named(found: np.ndarray, widths: Sequence[int]) -> dict[str, np.ndarray]:
    parts = np.split(found, np.cumsum(widths)[:-1], axis=1)
    return {str(i): np.ascontiguousarray(part) for i, part in enumerate(parts)}


def _is_causal(path: str | os.PathLike) -> bool:
    """Whether a folder is that of a causal language model: that of a text encoder has no config of one."""
    try:
        interop.read_config(path)
    except (ValueError, FileNotFoundError):
        return False
    return True
