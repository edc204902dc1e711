"""VGG networks with batch normalization as pure functions of parameters and running statistics."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.layers.batch_norm import batch_norm
from subspace_jax.nn.layers.conv import conv
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.pooling import max_pool
from subspace_jax.nn.layers.stacking import captured_states
from subspace_jax.nn.models.vgg.config import VGGConfig
from subspace_jax.nn.models.vision import VisionOutput, check_pixels, head_logits
from subspace_jax.nn.params import ParamSpec, conv_specs, dense_specs, norm_specs

PyTree = Any


def vgg_specs(config: VGGConfig) -> tuple[PyTree, PyTree]:
    """Returns the specs of parameters and of running statistics.

    ::

        stage{s}/layer{i}/conv/{kernel, bias}     [3, 3, in, out]
        stage{s}/layer{i}/norm/{scale, bias}      [out]; running statistics norm/{mean, var} in a separate tree
        hidden{i}/{kernel, bias}                  [in, out]
        head/{kernel, bias}                       [features, classes], with num_classes

    Args:
      config: The network.
    """
    params, stats, entering = {}, {}, config.channels
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        params[f"stage{stage}"], stats[f"stage{stage}"] = {}, {}
        for i in range(depth):
            kernel = {**conv_specs(3, entering, width), "bias": ParamSpec((width,), (None,))}
            params[f"stage{stage}"][f"layer{i}"] = {"conv": kernel, "norm": norm_specs(width)}
            running = {"mean": ParamSpec((width,), (None,)), "var": ParamSpec((width,), (None,), value=1.0)}
            stats[f"stage{stage}"][f"layer{i}"] = {"norm": running}
            entering = width
    for n in config.image_size:
        entering *= n >> len(config.depths)
    for i, width in enumerate(config.hidden):
        params[f"hidden{i}"] = dense_specs(
            entering, width, ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed"), stddev=0.01
        )
        entering = width
    if config.num_classes:
        params["head"] = dense_specs(entering, config.num_classes, ("embed", "class"), stddev=0.01)
    return params, stats


def vgg_apply(
    config: VGGConfig,
    params: PyTree,
    batch_stats: PyTree,
    pixels: jax.Array,
    *,
    train: bool = False,
    frozen_stats: bool = False,
    key: jax.Array | None = None,
    capture: Sequence[int] | str = (),
    axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
) -> VisionOutput:
    """Runs a VGG network.

    Args:
      config: The model.
      params: Its parameters; kernels may be structured.
      batch_stats: Its running statistics.
      pixels: Images ``[batch, height, width, channels]`` of ``image_size``, standardized, floating point.
      train: Whether to normalize by the statistics of the (global) batch and to apply dropout.
      frozen_stats: Whether to use and keep the running statistics in training too.
      key: Random key of dropout.
      capture: Stages whose outputs, after max-pooling, to return as hidden states: indices, or "all".
      axis_name: Mesh axes over which the batch is sharded, inside ``shard_map``.
      dtype: Dtype of the activations, that of ``pixels`` by default.

    Returns:
      Logits (at least float32), pooled features (the last hidden layer, after ReLU and dropout), tokens (the last
      feature map ``[batch, h, w, channels]``), hidden states, and ``batch_stats`` after a training step.

    Raises:
      ValueError: The images have another size or other channels, ``capture`` is out of range, or a key is missing.
      TypeError: ``pixels`` are not floating point.
    """
    check_pixels(pixels, config.channels)
    if pixels.shape[1:3] != tuple(config.image_size):
        raise ValueError(f"pixels: expected images {config.image_size}, got {pixels.shape[1:3]}")
    if train and key is None and any(config.dropout):
        raise ValueError(f"key: a random key is needed to train with dropout {config.dropout}, got None")
    wanted = captured_states(capture, len(config.depths))
    norm = functools.partial(
        batch_norm,
        train=train and not frozen_stats,
        eps=config.norm_eps,
        momentum=config.norm_momentum,
        axis_name=axis_name,
    )
    x, after, hidden = pixels if dtype is None else pixels.astype(dtype), {}, []
    for stage, depth in enumerate(config.depths):
        after[f"stage{stage}"] = {}
        for i in range(depth):
            own, running = (tree[f"stage{stage}"][f"layer{i}"] for tree in (params, batch_stats))
            x = conv(x, own["conv"]["kernel"], padding=1)
            x = x + own["conv"]["bias"].astype(x.dtype).reshape(1, 1, 1, -1)
            n, r = own["norm"], running["norm"]
            x, (mean, var) = norm(x, n["scale"], n["bias"], r["mean"], r["var"])
            after[f"stage{stage}"][f"layer{i}"] = {"norm": {"mean": mean, "var": var}}
            x = jax.nn.relu(x)
        x = max_pool(x, 2, strides=2)
        hidden.append(x)

    y = x.reshape(x.shape[0], -1)
    for i, rate in enumerate(config.dropout):
        y = jax.nn.relu(linear(y, params[f"hidden{i}"]["kernel"], params[f"hidden{i}"]["bias"]))
        if train and rate:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, y.shape)
            y = jnp.where(kept, y / (1 - rate), jnp.zeros_like(y))
    return VisionOutput(
        logits=head_logits(params, y),
        pooled=y,
        tokens=x,
        hidden=tuple(hidden[i] for i in wanted) if wanted else None,
        batch_stats=after if train else None,
    )
