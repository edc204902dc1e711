"""Swin transformers as pure functions of parameters."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.linalg import working_dtype
from subspace_jax.nn.layers.activations import ACTIVATIONS
from subspace_jax.nn.layers.drop_path import drop_path, drop_path_keys, drop_path_rates
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.norms import layer_norm
from subspace_jax.nn.layers.stacking import captured_states
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.swin.windows import relative_position_index, shifted_window_mask
from subspace_jax.nn.models.vision import VisionOutput, check_pixels, head_logits
from subspace_jax.nn.params import ParamSpec, dense_specs, norm_specs

PyTree = Any

# Epsilon of the norms in patch embedding and merging, which checkpoints don't configure.
FIXED_EPS = 1e-5


def swin_specs(config: SwinConfig) -> PyTree:
    """Returns the specs of the parameters.

    ::

        patch_embed/{kernel, bias}                        [patch^2 channels, e]: rows, columns, channels of a patch
        embed_norm/{scale, bias}                          [e]
        position/embedding                                [patches, e], with absolute_positions
        stage{s}/block{b}/norm1/{scale, bias}             [c], c = e 2^s
        stage{s}/block{b}/attn/{q, k, v, out}/{kernel, bias}  [c, c]
        stage{s}/block{b}/attn/relative_bias/table        [(2 window - 1)^2, heads]
        stage{s}/block{b}/norm2/{scale, bias}             [c]
        stage{s}/block{b}/mlp/{up, down}/{kernel, bias}   [c, f], [f, c]
        stage{s}/merge/norm/{scale, bias}                 [4 c], in all stages but the last
        stage{s}/merge/reduction/kernel                   [4 c, 2 c]
        norm/{scale, bias}                                [features]
        head/{kernel, bias}                               [features, classes], with num_classes

    Args:
      config: The model.
    """
    width, std = config.embed_dim, 0.02
    specs = {
        "patch_embed": dense_specs(config.patch_size**2 * config.channels, width, (None, "embed"), stddev=std),
        "embed_norm": norm_specs(width),
        "norm": norm_specs(config.out_features),
    }
    if config.absolute_positions:
        patches = math.prod(config.maps(*config.image_size)[0])
        specs["position"] = {"embedding": ParamSpec((patches, width), (None, "embed"), std)}
    for stage, (width, depth, heads) in enumerate(zip(config.widths, config.depths, config.num_heads, strict=True)):
        inner = int(config.mlp_ratio * width)
        into, out = ("embed", "heads"), ("heads", "embed")
        block = {
            "norm1": norm_specs(width),
            "attn": {
                **{name: dense_specs(width, width, into, bias=config.qkv_bias, stddev=std) for name in ("q", "k", "v")},
                "out": dense_specs(width, width, out, stddev=std),
                "relative_bias": {"table": ParamSpec(((2 * config.window - 1) ** 2, heads), (None, None), std)},
            },
            "norm2": norm_specs(width),
            "mlp": {
                "up": dense_specs(width, inner, ("embed", "mlp"), stddev=std),
                "down": dense_specs(inner, width, ("mlp", "embed"), stddev=std),
            },
        }
        specs[f"stage{stage}"] = {f"block{i}": block for i in range(depth)}
        if stage + 1 < len(config.depths):
            specs[f"stage{stage}"]["merge"] = {
                "norm": norm_specs(4 * width),
                "reduction": dense_specs(4 * width, 2 * width, ("mlp", "embed"), bias=False, stddev=std),
            }
    if config.num_classes:
        specs["head"] = dense_specs(config.out_features, config.num_classes, ("embed", "class"), stddev=std)
    return specs


def swin_apply(
    config: SwinConfig,
    params: PyTree,
    pixels: jax.Array,
    *,
    train: bool = False,
    key: jax.Array | None = None,
    capture: Sequence[int] | str = (),
    remat: bool = False,
    dtype: DTypeLike | None = None,
) -> VisionOutput:
    """Runs a Swin transformer.

    Args:
      config: The model.
      params: Its parameters; kernels may be structured.
      pixels: Images ``[batch, height, width, channels]``, standardized, floating point.
      train: Whether to apply stochastic depth.
      key: Random key of stochastic depth.
      capture: Indices of the hidden states to return, or "all".  State 0 is the patch embeddings; see
        :class:`SwinConfig` for the others.
      remat: Whether the backward pass recomputes the inside of a block.
      dtype: Dtype of the activations, that of ``pixels`` by default; softmax and norms are at least float32.

    Returns:
      Logits (at least float32), pooled features ``[batch, out_features]``, tokens ``[batch, patches, out_features]``
      after the last norm, and hidden states ``[batch, patches, width]``, patches row by row.

    Raises:
      ValueError: The images have other channels, a stage has fewer patches than a window, or is no multiple of the
        window of a "timm" model; the position embeddings are for another size; ``capture`` is out of range; or a key is
        missing.
      TypeError: ``pixels`` are not floating point.
    """
    check_pixels(pixels, config.channels)
    _check_size(config, *pixels.shape[1:3])
    wanted = captured_states(capture, len(config.depths) + 1)
    keys = drop_path_keys(key, train, config.drop_path, sum(config.depths))
    rates = drop_path_rates(config.drop_path, sum(config.depths))

    x = _embed(config, params, pixels if dtype is None else pixels.astype(dtype))
    hidden, first = {0: x}, 0
    for stage, depth in enumerate(config.depths):
        own, here = params[f"stage{stage}"], slice(first, first + depth)
        x = _blocks(config, stage, [own[f"block{i}"] for i in range(depth)], x, keys[here], rates[here], remat)
        first += depth
        if config.convention == "timm":
            hidden[stage + 1] = x
        if "merge" in own:
            x = _merge(own["merge"], x)
        hidden.setdefault(stage + 1, x)

    tokens = _norm(params["norm"], x, config.norm_eps).reshape(x.shape[0], -1, x.shape[-1])
    pooled = jnp.mean(tokens, axis=1)
    states = tuple(hidden[i].reshape(x.shape[0], -1, hidden[i].shape[-1]) for i in wanted)
    return VisionOutput(
        logits=head_logits(params, pooled), pooled=pooled, tokens=tokens, hidden=states if wanted else None
    )


def _check_size(config: SwinConfig, height: int, width: int) -> None:
    maps, size = config.maps(height, width), (height, width)
    if config.absolute_positions and maps[0] != config.maps(*config.image_size)[0]:
        raise ValueError(f"pixels: the positions are those of images {config.image_size}, got {size}")
    if any(min(sides) < config.window for sides in maps):
        raise ValueError(f"pixels: images {size} have {maps} patches a stage, fewer than a window of {config.window}")
    if config.convention == "timm" and any(n % config.window for sides in maps for n in sides):
        raise ValueError(
            f"pixels: images {size} have {maps} patches a stage; a timm model takes multiples of its window of "
            f"{config.window} only"
        )


def _norm(params: PyTree, x: jax.Array, eps: float) -> jax.Array:
    return layer_norm(x, params["scale"], params["bias"], eps)


def _linear(params: PyTree, x: jax.Array) -> jax.Array:
    return linear(x, params["kernel"], params.get("bias"))


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    """Pads with zeros below and right to a multiple of ``multiple``."""
    below, right = (-n % multiple for n in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def _cells(x: jax.Array, side: int) -> jax.Array:
    """Splits ``[batch, h, w, c]`` into squares ``[batch, h / side, w / side, side, side, c]``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3)


def _embed(config: SwinConfig, params: PyTree, pixels: jax.Array) -> jax.Array:
    cells = _cells(_pad(pixels, config.patch_size), config.patch_size)
    x = _linear(params["patch_embed"], cells.reshape(*cells.shape[:3], -1))
    x = _norm(params["embed_norm"], x, FIXED_EPS)
    if config.absolute_positions:
        x = x + params["position"]["embedding"].astype(x.dtype).reshape(1, *x.shape[1:])
    return x


def _merge(params: PyTree, x: jax.Array) -> jax.Array:
    """Merges 2 x 2 patches, channels in the order upper left, lower left, upper right, lower right."""
    cells = _cells(_pad(x, 2), 2).swapaxes(3, 4)
    x = _norm(params["norm"], cells.reshape(*cells.shape[:3], -1), FIXED_EPS)
    return _linear(params["reduction"], x)


def _blocks(config, stage, params, x, keys, rates, remat) -> jax.Array:
    """Runs the blocks of a stage, windows shifted in every other.

    Pairs of a plain and a shifted block run in a scan: the compiler for TPUs takes tens of seconds for the gradient of
    each block.
    """
    # A stage of one window has no shifts.
    native = config.maps(*config.image_size)[stage] if config.convention == "timm" else x.shape[1:3]
    shifts = (0,) if min(native) <= config.window else (0, config.window // 2)

    def pair_of_blocks(x, params, keys, rates):
        for shift, *own in zip(shifts, params, keys, rates, strict=False):
            run = functools.partial(_block, config, stage, shift)
            x = (jax.checkpoint(run) if remat else run)(x, *own)
        return x

    count = len(params) // len(shifts) * len(shifts)
    if count > len(shifts) and _alike(params):

        def stacked(items):
            """Stacks the plain and the shifted blocks."""
            return [
                jax.tree.map(lambda *xs: jnp.stack(xs), *items[i : count : len(shifts)]) for i in range(len(shifts))
            ]

        stacks = stacked(params), stacked(keys), stacked([jnp.float32(rate) for rate in rates])
        x, _ = jax.lax.scan(lambda x, own: (pair_of_blocks(x, *own), None), x, stacks)
        params, keys, rates = params[count:], keys[count:], rates[count:]
    for i in range(0, len(params), len(shifts)):
        x = pair_of_blocks(x, params[i:], keys[i:], rates[i:])
    return x


def _alike(trees: Sequence[PyTree]) -> bool:
    """Whether trees can be stacked; some blocks may have adapters and others not."""
    kinds = [(jax.tree.structure(tree), *((x.shape, x.dtype) for x in jax.tree.leaves(tree))) for tree in trees]
    return all(kind == kinds[0] for kind in kinds)


def _block(config, stage, shift, x, params, key, rate) -> jax.Array:
    first, second = (None, None) if key is None else jax.random.split(key)
    mixed = _window_attention(
        config, config.num_heads[stage], shift, params["attn"], _norm(params["norm1"], x, config.norm_eps)
    )
    x = x + drop_path(first, mixed, rate)
    mlp = params["mlp"]
    inner = ACTIVATIONS[config.activation](_linear(mlp["up"], _norm(params["norm2"], x, config.norm_eps)))
    return x + drop_path(second, _linear(mlp["down"], inner), rate)


def _window_attention(config: SwinConfig, heads: int, shift: int, params: PyTree, x: jax.Array) -> jax.Array:
    """Attention in windows of ``x [batch, h, w, c]``; padding is not masked, as in training of the published models."""
    batch, height, width, channels = x.shape
    side = config.window
    x = _pad(x, side)
    padded = x.shape[1:3]
    if shift:
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
    windows = _cells(x, side).reshape(batch, -1, side * side, channels)
    query, key, value = (
        _linear(params[name], windows).reshape(*windows.shape[:3], heads, -1) for name in ("q", "k", "v")
    )

    wide = working_dtype(x)
    scores = jnp.einsum("bnqhd,bnkhd->bnhqk", query, key, preferred_element_type=wide) / math.sqrt(query.shape[-1])
    table = params["relative_bias"]["table"].astype(wide)
    bias = table[relative_position_index(side).reshape(-1)].reshape(side * side, side * side, heads)
    scores = scores + jnp.moveaxis(bias, -1, 0)[None, None]
    if shift:
        scores = scores + shifted_window_mask(*padded, side, shift).astype(wide)[None, :, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, value).reshape(windows.shape)

    mixed = _linear(params["out"], mixed).reshape(batch, padded[0] // side, padded[1] // side, side, side, channels)
    x = mixed.swapaxes(2, 3).reshape(batch, *padded, channels)
    if shift:
        x = jnp.roll(x, (shift, shift), axis=(1, 2))
    return x[:, :height, :width]
