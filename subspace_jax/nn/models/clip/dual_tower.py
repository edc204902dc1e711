"""Dual encoders of images and texts: CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.linalg import unit_vectors, working_dtype
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.models.clip.text_tower import (
    TextTowerConfig,
    text_tower_apply,
    text_tower_from_embeddings,
    text_tower_specs,
)
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import vision_transformer_apply, vision_transformer_specs
from subspace_jax.nn.params import ParamSpec

PyTree = Any


@dataclass(frozen=True)
class DualTowerConfig:
    """An image tower and a text tower.

    Attributes:
      vision: The image tower, without a classifier.
      text: The text tower.
      projection_size: Width of the linear projections of both pooled vectors; 0 for none.
      biased: Whether similarities have a bias, as in SigLIP.
    """

    vision: VisionTransformerConfig
    text: TextTowerConfig
    projection_size: int = 0
    biased: bool = False

    def __post_init__(self):
        if self.vision.num_classes or self.vision.pool == "none":
            raise ValueError("vision: expected a tower with a pooled vector and without classes")
        text = self.text.head_size or self.text.width
        if not self.projection_size and text != self.vision.width:
            raise ValueError(f"projection_size: vectors of {self.vision.width} and {text} features need a projection")

    def replace(self, **changes) -> "DualTowerConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def dual_tower_specs(config: DualTowerConfig) -> PyTree:
    """Returns the specs of the parameters.

    ::

        vision/..., text/...                     see vision_transformer_specs, text_tower_specs
        image_projection/kernel                  [d_v, projection_size]
        text_projection/kernel                   [d_t, projection_size]
        similarity/{scale, bias}                 []   logarithm of the scale; bias with biased
    """
    specs = {"vision": vision_transformer_specs(config.vision), "text": text_tower_specs(config.text)}
    if config.projection_size:
        widths = {
            "image_projection": config.vision.width,
            "text_projection": config.text.head_size or config.text.width,
        }
        for name, width in widths.items():
            specs[name] = {"kernel": ParamSpec((width, config.projection_size), ("embed", None), width**-0.5)}
    # The initial values of both papers.
    specs["similarity"] = {"scale": ParamSpec((), (), value=2.3026 if config.biased else 2.6592)}
    if config.biased:
        specs["similarity"]["bias"] = ParamSpec((), (), value=-10.0)
    return specs


def encode_image(
    config: DualTowerConfig, params: PyTree, pixels: jax.Array, *, normalize: bool = True, **options: Any
) -> jax.Array:
    """Returns the embeddings of images.

    Args:
      config: The model.
      params: Parameters as laid out by :func:`dual_tower_specs`.
      pixels: ``[batch, height, width, channels]``, floating point.
      normalize: Whether to scale embeddings to length 1.
      **options: Further arguments of :func:`vision_transformer_apply`.

    Returns:
      ``[batch, features]``, in at least float32 where normalized, otherwise in the dtype of the activations.
    """
    pooled = vision_transformer_apply(config.vision, params["vision"], pixels, **options).pooled
    return _project(params.get("image_projection"), pooled, normalize)


def encode_text(
    config: DualTowerConfig,
    params: PyTree,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    normalize: bool = True,
    **options: Any,
) -> jax.Array:
    """Returns the embeddings of texts.

    Args:
      config: The model.
      params: Its parameters.
      tokens: ``[batch, length]`` integers; for SigLIP padded to ``max_length``.
      mask: ``[batch, length]``, zero for padding.
      normalize: Whether to scale embeddings to length 1.
      **options: Further arguments of :func:`text_tower_apply`.

    Returns:
      ``[batch, features]``, see :func:`encode_image`.
    """
    pooled = text_tower_apply(config.text, params["text"], tokens, attention_mask=mask, **options).pooled
    return _project(params.get("text_projection"), pooled, normalize)


def encode_prompts(
    config: DualTowerConfig, params: PyTree, prompts: jax.Array, ends: jax.Array, *, normalize: bool = True
) -> jax.Array:
    """Returns the embeddings of texts given as token embeddings, as prompt learning makes them.

    Args:
      config: The model.
      params: Its parameters.
      prompts: Token embeddings ``[batch, length, d_t]``, without positions.
      ends: Position of each text's pooled state, ``[batch]`` integers: that of the end token in CLIP.
      normalize: Whether to scale embeddings to length 1.

    Returns:
      ``[batch, features]``, see :func:`encode_image`.
    """
    pooled = text_tower_from_embeddings(config.text, params["text"], prompts, ends)
    return _project(params.get("text_projection"), pooled, normalize)


def dual_tower_apply(
    config: DualTowerConfig, params: PyTree, pixels: jax.Array, tokens: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Returns the similarities of all images and texts, ``[images, texts]``; see :func:`similarity`.

    Args:
      config: The model.
      params: Its parameters.
      pixels: See :func:`encode_image`.
      tokens: See :func:`encode_text`.
      mask: See :func:`encode_text`.
    """
    image, text = encode_image(config, params, pixels), encode_text(config, params, tokens, mask)
    return similarity(config, params, image, text)


def similarity(config: DualTowerConfig, params: PyTree, image: jax.Array, text: jax.Array) -> jax.Array:
    """Returns the similarities of images and texts, ``exp(scale) cos(image, text) + bias``.

    Args:
      config: The model.
      params: Its parameters; only ``params["similarity"]`` is used.
      image: Embeddings ``[images, features]``.
      text: Embeddings ``[texts, features]``.

    Returns:
      ``[images, texts]`` in at least float32; in SigLIP, logits of the probability of a match.

    Raises:
      ValueError: The embeddings have different widths.
    """
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"similarity: expected [images, features], [texts, features]; got {image.shape}, {text.shape}")
    dtype = working_dtype(image)
    cosines = jnp.matmul(unit(image), unit(text).T, preferred_element_type=dtype)
    scores = jnp.exp(params["similarity"]["scale"].astype(dtype)) * cosines
    return scores + params["similarity"]["bias"].astype(dtype) if config.biased else scores


def unit(x: jax.Array) -> jax.Array:
    """Scales vectors to length 1 in at least float32, without an epsilon; zeros stay zeros."""
    return unit_vectors(x.astype(working_dtype(x)))


def _project(projection: PyTree | None, pooled: jax.Array, normalize: bool) -> jax.Array:
    features = pooled if projection is None else linear(pooled, projection["kernel"])
    return unit(features) if normalize else features
