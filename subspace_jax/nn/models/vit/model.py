"""Vision transformers as pure functions: ViT, DeiT, DeiT III, the image towers of CLIP and SigLIP, DINOv2."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.linalg import working_dtype
from subspace_jax.nn.layers.activations import ACTIVATIONS
from subspace_jax.nn.layers.attention import attention
from subspace_jax.nn.layers.encoder import encode, encoder_specs, split_heads
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.mlp import mlp
from subspace_jax.nn.layers.norms import layer_norm
from subspace_jax.nn.layers.position_resampling import resample_positions
from subspace_jax.nn.layers.stacking import DEFAULT_OPTIONS, LayerOptions
from subspace_jax.nn.models.vision import VisionOutput, check_pixels
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.params import ParamSpec, dense_specs, norm_specs

PyTree = Any


def vision_transformer_specs(config: VisionTransformerConfig) -> PyTree:
    """Returns the specs of the parameters.

    ::

        patch/{kernel, bias}            [p p c, d]     pixels of a patch by row, column, channel
        prefix/{cls, distillation, mask} [1, d]        the tokens of the config
        prefix/registers                [R, d]
        position/embedding              [positions, d]
        pre_norm/{scale, bias}          [d]            with pre_norm
        layers/...                      [L, ...]       see encoder_specs
        norm/{scale, bias}              [d]
        pool/probe                      [1, d]         with attention_pool, as all of pool
        pool/attn/{q, k, v, out}/{kernel, bias}, pool/norm/{scale, bias}, pool/mlp/{up, down}/{kernel, bias}
        pooler/{kernel, bias}           [d, pooler_size]
        head/{kernel, bias}             [d, classes]
        head_distilled/{kernel, bias}   [d, classes]

    Args:
      config: The model.
    """
    d = config.width
    patch = config.patch_size * config.patch_size * config.channels
    token = ParamSpec((1, d), (None, None), 0.02)
    prefix = {"cls": config.class_token, "distillation": config.distillation_token, "mask": config.mask_token}
    prefix = {name: token for name, there in prefix.items() if there}
    if config.registers:
        prefix["registers"] = ParamSpec((config.registers, d), (None, None), 0.02)
    specs = {
        "patch": dense_specs(patch, d, (None, "embed"), bias=config.patch_bias),
        "position": {"embedding": ParamSpec((config.position_rows, d), (None, "embed"), 0.02)},
        "layers": encoder_specs(config.encoder),
        "norm": norm_specs(d),
    }
    if prefix:
        specs["prefix"] = prefix
    if config.pre_norm:
        specs["pre_norm"] = norm_specs(d)
    if config.attention_pool:
        into, out = ("embed", "heads"), ("heads", "embed")
        specs["pool"] = {
            "probe": token,
            "attn": {name: dense_specs(d, d, out if name == "out" else into) for name in ("q", "k", "v", "out")},
            "norm": norm_specs(d),
            "mlp": {
                "up": dense_specs(d, config.mlp_size, ("embed", "mlp")),
                "down": dense_specs(config.mlp_size, d, ("mlp", "embed")),
            },
        }
    if config.pooler_size:
        specs["pooler"] = dense_specs(d, config.pooler_size, ("embed", None))
    if config.num_classes:
        specs["head"] = dense_specs(d, config.num_classes, ("embed", "class"))
    if config.distilled_head:
        specs["head_distilled"] = dense_specs(d, config.num_classes, ("embed", "class"))
    return specs


def vision_transformer_apply(
    config: VisionTransformerConfig,
    params: PyTree,
    pixels: jax.Array,
    *,
    resample: bool = False,
    capture: Sequence[int] | str = (),
    train: bool = False,
    key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    logits_dtype: DTypeLike | None = None,
    options: LayerOptions = DEFAULT_OPTIONS,
) -> VisionOutput:
    """Runs a vision transformer.

    Works under ``jit``, ``grad`` and ``vmap``, with any kernel that :func:`subspace_jax.nn.linear` supports; the arrays
    of structured kernels in ``params["layers"]`` are stacked like all others.  Norms, softmax and the resampling of
    positions are computed in float32.  Mesh axes have to be of type Auto.

    Args:
      config: The model.
      params: Parameters as laid out by :func:`vision_transformer_specs`, layers stacked or not.
      pixels: ``[batch, height, width, channels]``, floating point, standardized.  Rows and columns beyond the last full
        patch are ignored.
      resample: Whether to resample the position embeddings for images of another size in every call; see also
        :func:`with_image_size`.
      capture: Indices of the hidden states to return, or "all": 0 is the input of the first layer, ``l`` the output of
        layer ``l``, without the last norm; negative indices count from the end.
      train: Whether to apply stochastic depth at ``config.drop_path``.
      key: Random key of stochastic depth.
      dtype: Dtype of the activations, that of the position embeddings by default.
      logits_dtype: Dtype of the logits, ``dtype`` by default.
      options: How the layers run.

    Returns:
      Logits where there is a head, the pooled vector, the tokens (normalized if the family does so before pooling),
      and the captured states.

    Raises:
      ValueError: The shape of ``pixels`` does not match the config, positions would have to be resampled without
        ``resample``, or from a grid that checkpoints of the family can't be resampled from; or ``capture`` is out of
        range.
      TypeError: ``pixels`` are not floating point.
    """
    grid = _patch_grid(config, pixels, resample)
    dtype = params["position"]["embedding"].dtype if dtype is None else jnp.dtype(dtype)
    x = options.on_stream(_embed(config, params, pixels.astype(dtype), grid))

    def norm(x, name="norm"):
        return layer_norm(x, params[name]["scale"], params[name]["bias"], config.norm_eps)

    x, hidden = encode(
        config.encoder,
        params["layers"],
        norm(x, "pre_norm") if config.pre_norm else x,
        capture=capture,
        drop_path=(config.drop_rates, key) if train else None,
        options=options,
    )
    tokens = norm(x) if config.norm_at == "tokens" else x
    pooled = _pool(config, params, tokens)
    if pooled is not None and config.norm_at == "pooled":
        pooled = norm(pooled)
    logits = _logits(config, params, tokens, pooled, logits_dtype) if config.num_classes else None
    if pooled is not None and config.pooler_size:
        act = ACTIVATIONS[config.pooler_activation]
        pooled = act(linear(pooled, params["pooler"]["kernel"], params["pooler"]["bias"]))
    return VisionOutput(logits=logits, pooled=pooled, tokens=tokens, hidden=hidden or None)


def with_image_size(
    config: VisionTransformerConfig, params: PyTree, image_size: tuple[int, int]
) -> tuple[VisionTransformerConfig, PyTree]:
    """Resamples the position embeddings once, for images of another size.

    Args:
      config: The model.
      params: Its parameters.
      image_size: Height and width.

    Returns:
      Config and parameters for images of that size.

    Raises:
      ValueError: The grid of the config is not square, and checkpoints of the family assume one.
    """
    changed = config.replace(image_size=tuple(image_size))
    _check_resampling(config, changed.grid)
    table = resample_positions(
        params["position"]["embedding"], config.grid, changed.grid, antialias=config.antialias_positions
    )
    return changed, {**params, "position": {"embedding": table}}


def _embed(config: VisionTransformerConfig, params: PyTree, pixels: jax.Array, grid: tuple[int, int]) -> jax.Array:
    batch, p, dtype = pixels.shape[0], config.patch_size, pixels.dtype
    pixels = pixels[:, : grid[0] * p, : grid[1] * p]
    patches = pixels.reshape(batch, grid[0], p, grid[1], p, config.channels).swapaxes(2, 3)
    x = linear(patches.reshape(batch, grid[0] * grid[1], -1), params["patch"]["kernel"], params["patch"].get("bias"))
    table = resample_positions(
        params["position"]["embedding"], config.grid, grid, antialias=config.antialias_positions
    ).astype(dtype)
    tokens = params.get("prefix", {})
    first = [tokens[name].astype(dtype) for name in ("cls", "distillation") if name in tokens]
    own = table.shape[0] - x.shape[1]
    x = x + table[None, own:]
    if not config.prefix:
        return x
    prefix = jnp.concatenate(first) if first else jnp.zeros((0, config.width), dtype)
    if own:
        prefix = prefix + table[:own]
    if config.registers:
        prefix = jnp.concatenate([prefix, tokens["registers"].astype(dtype)])
    return jnp.concatenate([jnp.broadcast_to(prefix[None], (batch, *prefix.shape)), x], axis=1)


def _pool(config: VisionTransformerConfig, params: PyTree, tokens: jax.Array) -> jax.Array | None:
    if config.pool == "none":
        return None
    if config.pool == "token":
        return tokens[:, 0]
    if config.pool == "distilled":
        return (tokens[:, 0] + tokens[:, 1]) / 2
    if config.pool == "mean":
        return jnp.mean(tokens[:, config.prefix :], axis=1, dtype=working_dtype(tokens)).astype(tokens.dtype)
    pool = params["pool"]

    def project(x, name):
        return linear(x, pool["attn"][name]["kernel"], pool["attn"][name]["bias"])

    probe = pool["probe"].astype(tokens.dtype)
    query = jnp.broadcast_to(project(probe, "q")[None], (tokens.shape[0], 1, config.width))
    parts = (split_heads(y, config.num_heads) for y in (query, project(tokens, "k"), project(tokens, "v")))
    mixed = project(attention(*parts, causal=False).reshape(query.shape), "out")
    shown = layer_norm(mixed, pool["norm"]["scale"], pool["norm"]["bias"], config.norm_eps)
    return (mixed + mlp(pool["mlp"], shown, config.activation))[:, 0]


def _logits(config: VisionTransformerConfig, params: PyTree, tokens, pooled, dtype) -> jax.Array:
    def score(x, name):
        return linear(x, params[name]["kernel"], params[name]["bias"], out_dtype=dtype)

    if config.distilled_head:
        return (score(tokens[:, 0], "head") + score(tokens[:, 1], "head_distilled")) / 2
    return score(pooled, "head")


def _patch_grid(config: VisionTransformerConfig, pixels: jax.Array, resample: bool) -> tuple[int, int]:
    """Checks the images, and returns their grid of patches."""
    check_pixels(pixels, config.channels)
    size = pixels.shape[1:3]
    grid = size[0] // config.patch_size, size[1] // config.patch_size
    if min(grid) < 1:
        raise ValueError(f"pixels: an image of {size} is smaller than a patch of {config.patch_size}")
    if size != config.image_size and not resample:
        raise ValueError(
            f"pixels: the positions are for images of {config.image_size}, got {size}; pass resample=True (--resample) "
            "to resample them in every call, or call with_image_size once"
        )
    _check_resampling(config, grid)
    return grid


def _check_resampling(config: VisionTransformerConfig, grid: tuple[int, int]) -> None:
    if grid != config.grid and config.grid[0] != config.grid[1] and not config.antialias_positions:
        raise ValueError(
            f"image size: positions of a {config.grid[0]} x {config.grid[1]} grid can't be resampled: Hugging Face "
            "resamples every table as a square grid"
        )
