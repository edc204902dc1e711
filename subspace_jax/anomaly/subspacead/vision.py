"""Features of patches by a vision transformer such as DINOv2: a mean over its middle blocks."""

import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import data, interop, nn

PyTree = Any
COMBINATIONS = ("mean", "concat", "group")


@dataclass(frozen=True)
class VisionPatches:
    """How features are taken from a vision transformer.

    Attributes:
      config: The model, for images of the side that is scored; layers after the last that is used are dropped.
      layers: Hidden states: 0 is the embeddings, ``i`` the output of block ``i - 1`` counted from 0, without the last
        norm.
      combine: "mean" over the states, "concat" of them, or "group": means of three neighbours each, concatenated.
      dtype: Dtype of the activations, "float32" or "bfloat16".
      saliency: Block, counted from 0, whose attention is the saliency of a patch; None for no saliency.
    """

    config: nn.VisionTransformerConfig
    layers: tuple[int, ...]
    combine: str = "mean"
    dtype: str = "float32"
    saliency: int | None = None

    def __post_init__(self):
        if self.combine not in COMBINATIONS:
            raise ValueError(f"combine: expected one of {COMBINATIONS}, got {self.combine!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {self.dtype!r}")
        last = self.config.num_layers
        if not self.layers or not all(0 <= layer <= last for layer in self.layers):
            raise ValueError(f"layers: expected hidden states 0 to {last}, got {self.layers}")
        if self.saliency is not None and not 0 <= self.saliency < last:
            raise ValueError(f"saliency: expected a block 0 to {last - 1}, got {self.saliency}")

    @property
    def side(self) -> int:
        """Side of the images."""
        return self.config.image_size[0]

    @property
    def width(self) -> int:
        """Width of the features."""
        parts = {"mean": 1, "concat": len(self.layers), "group": -(-len(self.layers) // 3)}
        return self.config.width * parts[self.combine]

    def features(self, params: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Features of images.

        Args:
          params: Parameters of the model.
          images: ``[batch, side, side, 3]`` uint8.

        Returns:
          ``[batch, h, w, width]`` in ``dtype``, and the saliency ``[batch, h, w]`` float32, or None.
        """
        pixels = data.standardize(images)
        extra = () if self.saliency is None else (self.saliency,)
        wanted = sorted({*self.layers, *extra})
        found = nn.vision_apply(self.config, params, pixels, capture=wanted, dtype=self.dtype).hidden
        states = dict(zip(wanted, found, strict=True))
        grid = self.config.grid
        used = [states[layer][:, self.config.prefix :] for layer in self.layers]
        size = {"mean": len(used), "concat": 1, "group": 3}[self.combine]
        groups = [used[i : i + size] for i in range(0, len(used), size)]
        means = [sum(x.astype(jnp.float32) for x in group) / len(group) for group in groups]
        features = jnp.concatenate(means, axis=-1).astype(self.dtype)
        saliency = None
        if self.saliency is not None:
            saliency = attention_saliency(self.config, params, states[self.saliency], self.saliency)
            saliency = saliency.reshape(-1, *grid)
        return features.reshape(-1, *grid, features.shape[-1]), saliency


def middle_layers(num_layers: int) -> tuple[int, ...]:
    """Hidden states after the middle blocks: 23 to 29 of 40 blocks as in arXiv 2602.23013, 7 to 9 of 12."""
    return tuple(range(int(0.55 * num_layers) + 1, int(0.7 * num_layers) + 2))


def attention_saliency(config: nn.VisionTransformerConfig, params: PyTree, hidden: jax.Array, block: int) -> jax.Array:
    """How much the register tokens, or the class token where there are none, attend to each patch.

    Step 8 of the method of arXiv 2602.23013.

    Args:
      config: The model.
      params: Its parameters.
      hidden: Input of the block, ``[batch, tokens, d]``.
      block: The block, counted from 0.

    Returns:
      ``[batch, patches]`` float32, a mean over heads and those tokens.
    """
    layer = jax.tree.map(lambda x: x[block], params["layers"])
    norm = layer["attn_norm"]
    x = nn.layer_norm(hidden, norm["scale"], norm["bias"], config.norm_eps)
    attn = layer["attn"]
    if config.fused_qkv:
        query, key, _ = jnp.split(nn.linear(x, attn["qkv"]["kernel"], attn["qkv"].get("bias")), 3, axis=-1)
    else:
        query, key = (nn.linear(x, attn[name]["kernel"], attn[name].get("bias")) for name in "qk")
    first, last = (config.prefix - config.registers, config.prefix) if config.registers else (0, 1)
    heads = (*x.shape[:2], config.num_heads, -1)
    query, key = query.reshape(heads)[:, first:last], key.reshape(heads)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / np.float32(np.sqrt(key.shape[-1])), axis=-1)
    return jnp.mean(weights[..., config.prefix :], axis=(1, 2))


def open_vision(
    path: str | os.PathLike,
    side: int = 448,
    *,
    layers: tuple[int, ...] | None = None,
    combine: str = "mean",
    dtype: str = "float32",
    saliency: int | None = None,
) -> tuple[VisionPatches, PyTree]:
    """Reads a vision transformer and prepares it for images of a side.

    Args:
      path: Folder of Hugging Face or timm.
      side: Side of the images in pixels, a multiple of the patch.
      layers: Hidden states; :func:`middle_layers` by default.
      combine: See :class:`VisionPatches`, also for the rest.
      dtype: Of the activations.
      saliency: Block of the saliency.

    Returns:
      How features are taken, and the parameters.

    Raises:
      FileNotFoundError: There is no such folder.
      ValueError: It holds no vision transformer, or the side is no multiple of the patch.
    """
    config, params = interop.load_vision(path)
    if not isinstance(config, nn.VisionTransformerConfig):
        raise ValueError(f"backbone: {path}: expected a vision transformer, got {type(config).__name__}")
    return prepared_vision(config, params, side, layers=layers, combine=combine, dtype=dtype, saliency=saliency)


def prepared_vision(
    config: nn.VisionTransformerConfig,
    params: PyTree,
    side: int,
    *,
    layers: tuple[int, ...] | None = None,
    combine: str = "mean",
    dtype: str = "float32",
    saliency: int | None = None,
) -> tuple[VisionPatches, PyTree]:
    """Resamples positions for images of a side, and drops the blocks after the last that is used.

    Arguments and errors: see :func:`open_vision`.
    """
    if side < 1 or side % config.patch_size:
        raise ValueError(f"side: expected a multiple of the patch of {config.patch_size} pixels, got {side}")
    layers = middle_layers(config.num_layers) if layers is None else tuple(layers)
    whole = VisionPatches(config, layers, combine, dtype, saliency)
    if config.image_size != (side, side):
        config, params = nn.with_image_size(config, params, (side, side))
    kept = max(*layers, 1, 0 if saliency is None else saliency + 1)
    config = config.replace(num_layers=kept, drop_path=0.0)
    params = {**params, "layers": jax.tree.map(lambda x: x[:kept], params["layers"])}
    return VisionPatches(config, layers, whole.combine, dtype, saliency), params
