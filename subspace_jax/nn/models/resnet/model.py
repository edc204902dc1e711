"""Residual networks of the ResNet family as pure functions of parameters and running statistics."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.layers.batch_norm import batch_norm
from subspace_jax.nn.layers.conv import conv
from subspace_jax.nn.layers.drop_path import drop_path, drop_path_keys, drop_path_rates
from subspace_jax.nn.layers.pooling import halve, max_pool
from subspace_jax.nn.layers.stacking import captured_states
from subspace_jax.nn.models.resnet.config import ResNetBlock, ResNetConfig
from subspace_jax.nn.models.vision import VisionOutput, check_pixels, head_logits
from subspace_jax.nn.params import ParamSpec, conv_specs, dense_specs, norm_specs

PyTree = Any


def resnet_specs(config: ResNetConfig) -> tuple[PyTree, PyTree]:
    """Returns the specs of parameters and of running statistics.

    A "layer" is a convolution without bias, followed by batch normalization::

        stem/layer{0..}/conv/kernel                      [7, 7, 3, width], or three of 3x3
        stem/layer{0..}/norm/{scale, bias}               [width]
        stage{s}/block{b}/layer{0..}/conv/kernel         [1 or 3, 1 or 3, in / groups, out]
        stage{s}/block{b}/layer{0..}/norm/{scale, bias}  [out]
        stage{s}/block{b}/shortcut/{conv, norm}/...      where a block changes width or resolution
        head/{kernel, bias}                              [features, classes], with num_classes

    Running statistics are a separate tree with the same paths, ``norm/{mean, var}``.

    The last normalization of every block is initialized with scale 0 (Goyal et al., arXiv 1706.02677, section 5.1).

    Args:
      config: The network.
    """
    params, stats = {"stem": {}}, {"stem": {}}
    side, entering = (7 if len(config.stem) == 1 else 3), config.channels
    for i, width in enumerate(config.stem):
        params["stem"][f"layer{i}"], stats["stem"][f"layer{i}"] = _layer_specs(side, entering, width)
        entering = width
    for block in config.blocks():
        stage, name = block.name
        layers = {key: _layer_specs(*sizes) for key, sizes in _layers(config, block).items()}
        own, statistics = ({key: pair[i] for key, pair in layers.items()} for i in (0, 1))
        last = max(key for key in own if key.startswith("layer"))
        own[last]["norm"] = norm_specs(block.widths[-1], scale=0.0)
        params.setdefault(stage, {})[name] = own
        stats.setdefault(stage, {})[name] = statistics
    if config.num_classes:
        params["head"] = dense_specs(config.out_features, config.num_classes, ("embed", "class"), stddev=0.01)
    return params, stats


def _layers(config: ResNetConfig, block: ResNetBlock) -> dict[str, tuple[int, int, int, int]]:
    """Returns window side, input and output channels and groups of each convolution of a block."""
    entering, inner, width = block.widths
    if config.block == "basic":
        layers = {"layer0": (3, entering, width, 1), "layer1": (3, width, width, 1)}
    else:
        layers = {
            "layer0": (1, entering, inner, 1),
            "layer1": (3, inner, inner, config.groups),
            "layer2": (1, inner, width, 1),
        }
    return {**layers, "shortcut": (1, entering, width, 1)} if block.projects else layers


def _layer_specs(side: int, m: int, n: int, groups: int = 1) -> tuple[dict, dict]:
    params = {"conv": conv_specs(side, m, n, groups), "norm": norm_specs(n)}
    return params, {"norm": {"mean": ParamSpec((n,), (None,)), "var": ParamSpec((n,), (None,), value=1.0)}}


def resnet_apply(
    config: ResNetConfig,
    params: PyTree,
    batch_stats: PyTree,
    pixels: jax.Array,
    *,
    train: bool = False,
    frozen_stats: bool = False,
    key: jax.Array | None = None,
    capture: Sequence[int] | str = (),
    axis_name: str | tuple[str, ...] | None = None,
    remat: bool = False,
    dtype: DTypeLike | None = None,
) -> VisionOutput:
    """Runs a residual network.

    Args:
      config: The model.
      params: Its parameters; kernels may be structured.
      batch_stats: Its running statistics.
      pixels: Images ``[batch, height, width, channels]``, standardized, floating point.
      train: Whether to normalize by the statistics of the (global) batch and to apply stochastic depth.
      frozen_stats: Whether to use and keep the running statistics in training too.
      key: Random key of stochastic depth.
      capture: Indices of the hidden states to return, or "all".  State 0 is the output of the stem, ``s + 1`` that of
        stage ``s``.
      axis_name: Mesh axes over which the batch is sharded, inside ``shard_map``.
      remat: Whether the backward pass recomputes the inside of a block.
      dtype: Dtype of the activations, that of ``pixels`` by default.

    Returns:
      Logits (at least float32), pooled features ``[batch, out_features]``, tokens ``[batch, h, w, out_features]``,
      hidden states ``[batch, h, w, channels]``, and ``batch_stats`` after a training step.

    Raises:
      ValueError: The images have other channels, ``capture`` is out of range, or a key is missing.
      TypeError: ``pixels`` are not floating point.
    """
    check_pixels(pixels, config.channels)
    wanted = captured_states(capture, len(config.depths) + 1)
    training = train and not frozen_stats
    keys = drop_path_keys(key, train, config.drop_path, sum(config.depths))
    norm = functools.partial(
        batch_norm, train=training, eps=config.norm_eps, momentum=config.norm_momentum, axis_name=axis_name
    )
    x = pixels if dtype is None else pixels.astype(dtype)

    after: dict[str, dict] = {"stem": {}}
    hidden = {}
    for i in range(len(config.stem)):
        name, side = f"layer{i}", 7 if len(config.stem) == 1 else 3
        x, after["stem"][name] = _layer(
            norm, params["stem"][name], batch_stats["stem"][name], x, strides=1 if i else 2, padding=side // 2
        )
        x = jax.nn.relu(x)
    hidden[0] = x
    x = max_pool(x, 3, strides=2, padding=1)
    if config.convention == "hf":
        hidden[0] = x

    rates = drop_path_rates(config.drop_path, sum(config.depths))
    for i, block in enumerate(config.blocks()):
        stage, name = block.name
        run = functools.partial(_block, config, block, norm, rate=rates[i])
        run = jax.checkpoint(run) if remat else run
        x, statistics = run((params[stage][name], batch_stats[stage][name]), x, keys[i])
        after.setdefault(stage, {})[name] = statistics
        hidden[int(stage.removeprefix("stage")) + 1] = x

    pooled = jnp.mean(x, axis=(1, 2))
    return VisionOutput(
        logits=head_logits(params, pooled),
        pooled=pooled,
        tokens=x,
        hidden=tuple(hidden[i] for i in wanted) if wanted else None,
        batch_stats=after if train else None,
    )


def _layer(norm, params, stats, x, *, strides=1, padding=0, groups=1) -> tuple[jax.Array, dict]:
    x = conv(x, params["conv"]["kernel"], strides=strides, padding=padding, groups=groups)
    own, running = params["norm"], stats["norm"]
    x, (mean, var) = norm(x, own["scale"], own["bias"], running["mean"], running["var"])
    return x, {"norm": {"mean": mean, "var": var}}


def _block(config, block, norm, weights, x, key, rate) -> tuple[jax.Array, dict]:
    (params, stats), after = weights, {}

    def layer(name, x, **options):
        y, after[name] = _layer(norm, params[name], stats[name], x, **options)
        return y

    if config.block == "basic":
        y = jax.nn.relu(layer("layer0", x, strides=block.strides, padding=1))
        y = layer("layer1", y, padding=1)
    else:
        first, middle = (block.strides, 1) if config.stride_first else (1, block.strides)
        y = jax.nn.relu(layer("layer0", x, strides=first))
        y = jax.nn.relu(layer("layer1", y, strides=middle, padding=1, groups=config.groups))
        y = layer("layer2", y)
    strides = block.strides
    if config.average_shortcut and strides == 2:
        x, strides = halve(x), 1
    if block.projects:
        x = layer("shortcut", x, strides=strides)
    return jax.nn.relu(x + drop_path(key, y, rate)), after
