"""Vision transformers as pure functions: ViT, DeiT, DeiT3, the towers of CLIP and SigLIP, DINOv2."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax.linalg import working_dtype
from subspace_jax.nn.layers.attention import attention
from subspace_jax.nn.layers.encoder import (
    ACTIVATIONS,
    encode,
    encoder_specs,
    mlp,
    split_heads,
)
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.norms import layer_norm
from subspace_jax.nn.layers.position_resampling import resample_positions
from subspace_jax.nn.models.causal_lm.module import arrays_of, variables_of
from subspace_jax.nn.models.vision_output import VisionOutput
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.params import ParamSpec, dense_specs, draw_params, norm_specs, spec_axes, spec_shapes

PyTree = Any


def vision_transformer_specs(config: VisionTransformerConfig) -> PyTree:
    """Describes every parameter: a nested dict of :class:`ParamSpec` with the layout of the parameters.

    ::

        patch/{kernel, bias}            [p p c, d]     pixels of a patch by row, column, channel
        prefix/{cls, distillation, mask} [1, d]        those that there are
        prefix/registers                [R, d]
        position/embedding              [rows, d]
        pre_norm/{scale, bias}          [d]            pre_norm only
        layers/...                      [L, ...]       as encoder_specs has them
        norm/{scale, bias}              [d]
        pool/probe                      [1, d]         attention_pool only, as all of pool
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


def vision_transformer_axes(config: VisionTransformerConfig) -> PyTree:
    """Returns the logical axis names of every parameter, a tree of ``PartitionSpec``."""
    return spec_axes(vision_transformer_specs(config))


def vision_transformer_shapes(config: VisionTransformerConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns every parameter as a ``ShapeDtypeStruct``."""
    return spec_shapes(vision_transformer_specs(config), dtype)


def vision_transformer_init(key: jax.Array, config: VisionTransformerConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Draws fresh parameters: normal with deviation 0.02 (less where a block adds to the stream), norms 1, biases 0.

    Args:
      key: Random key.
      config: The model.
      dtype: Type of the parameters.

    Returns:
      Nested dict of arrays, as :func:`vision_transformer_specs` lays them out.
    """
    return draw_params(key, vision_transformer_specs(config), dtype)


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
    remat: str = "none",
    on_layer: Callable[[PyTree], PyTree] | None = None,
    on_stream: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
    unroll: int = 1,
) -> VisionOutput:
    """Looks at a batch of images.

    Works under ``jit``, ``grad`` and ``vmap``, with any kernel that :func:`subspace_jax.nn.linear` takes; the arrays of
    a structured kernel inside ``params["layers"]`` are stacked by layer like all others.  Norms, softmax and the
    resampling of positions are computed in float32.  On a mesh the axes are of type Auto.

    Args:
      config: The model.
      params: Nested dict, as :func:`vision_transformer_specs` lays it out.
      pixels: ``[batch, height, width, channels]``, floating point, normalised as the model expects.  Rows and columns
        beyond the last whole patch are left out.
      resample: Whether positions are resampled for images of another size, in every call; see also
        :func:`with_image_size`.
      capture: Entries of the list of ``layers + 1`` hidden states that are wanted: 0 is what enters the first block,
        ``l`` what block ``l`` leaves, without the last norm; negative ones count from the end.  "all" for all.
      train: Whether blocks are left out at the rates of ``config.drop_path``.
      key: Random key of those decisions.
      dtype: Type of the activations, that of the positions by default; parameters are rounded as they are used.
      logits_dtype: Type of the logits, ``dtype`` by default.
      remat: What the backward pass finds of each block: "none" keeps all that the compiler wants, "dots" the products
        with kernels, "full" nothing but the block's input.
      on_layer: Applied to the parameters of one block (leading axis gone) where the block is run.
      on_stream: Applied to the stream after the embedding and after every block.
      implementation: Of attention.
      unroll: Blocks in a step of the loop.

    Returns:
      Logits where there is a head, the pooled vector, the tokens (normalised if the family does so before pooling),
      and the captured states.

    Raises:
      ValueError: Pixels have another shape than the model takes, positions would have to be resampled without
        ``resample`` or from a grid that checkpoints of the kind can't be resampled from, or an option is unknown.
      TypeError: Pixels are not of floating point.
    """
    grid = _check(config, pixels, resample)
    dtype = params["position"]["embedding"].dtype if dtype is None else jnp.dtype(dtype)
    on_stream = on_stream or (lambda x: x)
    x = on_stream(_embed(config, params, pixels.astype(dtype), grid))

    def norm(x, name="norm"):
        return layer_norm(x, params[name]["scale"], params[name]["bias"], config.norm_eps)

    if config.pre_norm:
        x = norm(x, "pre_norm")
    x, hidden = encode(
        config.encoder,
        params["layers"],
        x,
        capture=range(config.num_layers + 1) if capture == "all" else capture,
        drop_path=config.drop_rates if train else None,
        key=key,
        remat=remat,
        on_layer=on_layer,
        on_stream=on_stream,
        implementation=implementation,
        unroll=unroll,
    )
    tokens = norm(x) if config.norm_at == "tokens" else x
    pooled = _pool(config, params, tokens)
    if pooled is not None and config.norm_at == "pooled":
        pooled = norm(pooled)
    logits = _logits(config, params, tokens, pooled, logits_dtype) if config.num_classes else None
    if pooled is not None and config.pooler_size:
        act = ACTIVATIONS[config.pooler_activation]
        pooled = act(linear(pooled, params["pooler"]["kernel"], params["pooler"]["bias"]))
    return VisionOutput(logits=logits, pooled=pooled, tokens=tokens, hidden=hidden if len(hidden) else None)


def with_image_size(
    config: VisionTransformerConfig, params: PyTree, image_size: tuple[int, int]
) -> tuple[VisionTransformerConfig, PyTree]:
    """Resamples the positions once, so that images of another size are native ones from then on.

    Args:
      config: The model.
      params: Its parameters.
      image_size: Height and width.

    Returns:
      The config and the parameters for images of that size.

    Raises:
      ValueError: The native grid is not square and checkpoints of the kind are resampled as if it were.
    """
    changed = config.replace(image_size=tuple(image_size))
    _check_resampling(config, changed.grid)
    table = resample_positions(
        params["position"]["embedding"], config.grid, changed.grid, antialias=config.antialias_positions
    )
    return changed, {**params, "position": {"embedding": table}}


class VisionTransformer(nnx.Module):
    """A vision transformer that holds its parameters; all else is :func:`vision_transformer_apply`.

    Args:
      config: The model.
      params: Its parameters; drawn from ``rngs`` where None.
      param_dtype: Type of drawn parameters.
      rngs: Source of randomness; its ``params`` stream is used.

    Raises:
      ValueError: Neither ``params`` nor ``rngs`` is given.
    """

    def __init__(
        self,
        config: VisionTransformerConfig,
        params: PyTree | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if params is None:
            if rngs is None:
                raise ValueError("VisionTransformer: expected params, or rngs to draw them from")
            params = vision_transformer_init(rngs.params(), config, param_dtype)
        self.config = config
        axes = vision_transformer_axes(config)
        for name, part in params.items():
            setattr(self, name, variables_of(part, axes[name]))

    @property
    def params(self) -> PyTree:
        """The parameters, as :func:`vision_transformer_apply` takes them."""
        return {name: arrays_of(getattr(self, name)) for name in vision_transformer_specs(self.config)}

    def __call__(self, pixels: jax.Array, **options) -> VisionOutput:
        """Looks at images ``[batch, height, width, channels]``, with the options of the function."""
        return vision_transformer_apply(self.config, self.params, pixels, **options)


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


def _check(config: VisionTransformerConfig, pixels: jax.Array, resample: bool) -> tuple[int, int]:
    """Returns the grid of patches of the images."""
    if pixels.ndim != 4 or pixels.shape[-1] != config.channels:
        raise ValueError(f"pixels: expected [batch, height, width, {config.channels}], got {pixels.shape}")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise TypeError(f"pixels: expected floating point, normalised; got {pixels.dtype}")
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
            "takes any table for a square one"
        )
