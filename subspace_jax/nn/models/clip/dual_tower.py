"""Dual towers: images and texts in one space, as CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) have them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.linalg import unit_vectors, working_dtype
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.models.clip.text_tower import TextTowerConfig, text_tower_apply, text_tower_specs
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import vision_transformer_apply, vision_transformer_specs
from subspace_jax.nn.params import ParamSpec, draw_params, spec_axes, spec_shapes

PyTree = Any


@dataclass(frozen=True)
class DualTowerConfig:
    """A tower for images and one for texts.

    Attributes:
      vision: The tower for images, without a classifier.
      text: The tower for texts.
      projection_size: Width to which both pooled vectors are projected, without biases; 0 where the towers themselves
        end in vectors of one width.
      biased: Whether similarities have a bias, as those of SigLIP.
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
    """Describes every parameter: a nested dict of :class:`ParamSpec` with the layout of the parameters.

    ::

        vision/..., text/...                     as the towers have them
        image_projection/kernel                  [d_v, projection_size]
        text_projection/kernel                   [d_t, projection_size]
        similarity/{scale, bias}                 []   the logarithm of the scale; the bias where there is one
    """
    specs = {"vision": vision_transformer_specs(config.vision), "text": text_tower_specs(config.text)}
    if config.projection_size:
        widths = {
            "image_projection": config.vision.width,
            "text_projection": config.text.head_size or config.text.width,
        }
        for name, width in widths.items():
            specs[name] = {"kernel": ParamSpec((width, config.projection_size), ("embed", None), width**-0.5)}
    # The values that both papers start with.
    specs["similarity"] = {"scale": ParamSpec((), (), value=2.3026 if config.biased else 2.6592)}
    if config.biased:
        specs["similarity"]["bias"] = ParamSpec((), (), value=-10.0)
    return specs


def dual_tower_axes(config: DualTowerConfig) -> PyTree:
    """Returns the logical axis names of every parameter, a tree of ``PartitionSpec``."""
    return spec_axes(dual_tower_specs(config))


def dual_tower_shapes(config: DualTowerConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns every parameter as a ``ShapeDtypeStruct``."""
    return spec_shapes(dual_tower_specs(config), dtype)


def dual_tower_init(key: jax.Array, config: DualTowerConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Draws fresh parameters, as :func:`dual_tower_specs` lays them out."""
    return draw_params(key, dual_tower_specs(config), dtype)


def encode_image(
    config: DualTowerConfig, params: PyTree, pixels: jax.Array, *, normalize: bool = True, **options: Any
) -> jax.Array:
    """Returns one vector for each image.

    Args:
      config: The towers.
      params: Their parameters, as :func:`dual_tower_specs` lays them out.
      pixels: ``[batch, height, width, channels]``, floating point.
      normalize: Whether vectors have length 1.
      **options: Of :func:`vision_transformer_apply`.

    Returns:
      ``[batch, features]`` in float32 or wider where normalised, otherwise in the type of the activations.
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
    """Returns one vector for each text.

    Args:
      config: The towers.
      params: Their parameters.
      tokens: ``[batch, length]`` integers; for SigLIP padded to all its positions.
      mask: ``[batch, length]``, nonzero for tokens that may be seen.
      normalize: Whether vectors have length 1.
      **options: Of :func:`text_tower_apply`.

    Returns:
      ``[batch, features]``, see :func:`encode_image`.
    """
    pooled = text_tower_apply(config.text, params["text"], tokens, attention_mask=mask, **options).pooled
    return _project(params.get("text_projection"), pooled, normalize)


def similarity(config: DualTowerConfig, params: PyTree, image: jax.Array, text: jax.Array) -> jax.Array:
    """Scores every image with every text: ``exp(scale) cos(image, text)``, plus the bias where there is one.

    Args:
      config: The towers.
      params: Their parameters; only ``params["similarity"]`` is used.
      image: ``[images, features]``.
      text: ``[texts, features]``.

    Returns:
      ``[images, texts]`` in float32 or wider; of SigLIP the sigmoid of it is a probability.

    Raises:
      ValueError: The vectors have different widths.
    """
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"similarity: expected [images, features], [texts, features]; got {image.shape}, {text.shape}")
    dtype = working_dtype(image)
    cosines = jnp.matmul(unit(image), unit(text).T, preferred_element_type=dtype)
    scores = jnp.exp(params["similarity"]["scale"].astype(dtype)) * cosines
    return scores + params["similarity"]["bias"].astype(dtype) if config.biased else scores


def unit(x: jax.Array) -> jax.Array:
    """Brings vectors to length 1, in float32 or wider and without an epsilon; zeros stay zeros."""
    return unit_vectors(x.astype(working_dtype(x)))


def _project(projection: PyTree | None, pooled: jax.Array, normalize: bool) -> jax.Array:
    features = pooled if projection is None else linear(pooled, projection["kernel"])
    return unit(features) if normalize else features
