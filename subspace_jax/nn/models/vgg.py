"""VGG with batch normalisation as pure functions of parameters and running statistics."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.layers.batch_norm import batch_norm
from subspace_jax.nn.layers.conv import conv
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.pooling import max_pool
from subspace_jax.nn.models.resnet.model import captured, check_pixels, head_logits
from subspace_jax.nn.models.vision_output import VisionOutput
from subspace_jax.nn.params import ParamSpec, conv_specs, dense_specs, draw_params, norm_specs, spec_axes

PyTree = Any


@dataclass(frozen=True)
class VGGConfig:
    """A VGG network (Simonyan and Zisserman, arXiv 1409.1556) with batch normalisation; VGG13-BN by default.

    Attributes:
      depths: Convolutions of each stage; a stage ends with a max-pool that halves the resolution.
      widths: Channels of each stage.
      hidden: Widths of the fully connected layers; the last is the feature width.
      dropout: Rate of dropout after each of them.  The Grassmann study (arXiv 2308.01547) sets the last to 0.
      image_size: Height and width of the images, on which the first fully connected layer depends.
      num_classes: Classes of the linear head; 0 for a network without one.
      channels: Channels of the images.
      norm_eps: Added to the variance in every normalisation.
      norm_momentum: Weight of the old running statistics.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: tuple[int, ...] = (4096, 4096)
    dropout: tuple[float, ...] = (0.5, 0.5)
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    channels: int = 3
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9

    def __post_init__(self):
        if not self.depths or len(self.depths) != len(self.widths) or min(*self.depths, *self.widths) < 1:
            raise ValueError(f"depths: expected a positive number for each of widths {self.widths}, got {self.depths}")
        if not self.hidden or len(self.hidden) != len(self.dropout) or min(self.hidden) < 1:
            raise ValueError(f"hidden: expected a positive width for each of dropout {self.dropout}, got {self.hidden}")
        if any(not 0 <= rate < 1 for rate in self.dropout):
            raise ValueError(f"dropout: expected rates in [0, 1), got {self.dropout}")
        if len(self.image_size) != 2 or min(self.image_size) < 2 ** len(self.depths):
            raise ValueError(f"image_size: expected at least {2 ** len(self.depths)} pixels, got {self.image_size}")

    @property
    def out_features(self) -> int:
        """Width of the pooled features."""
        return self.hidden[-1]

    def replace(self, **changes) -> "VGGConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def vgg_specs(config: VGGConfig) -> tuple[PyTree, PyTree]:
    """Describes parameters and running statistics: two nested dicts of :class:`ParamSpec`.

    ::

        stage{s}/layer{i}/conv/{kernel, bias}     [3, 3, in, out]
        stage{s}/layer{i}/norm/{scale, bias}      [out]; running statistics norm/{mean, var} in a tree of their own
        hidden{i}/{kernel, bias}                  [in, out]
        head/{kernel, bias}                       [features, classes], where there are classes

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


def vgg_axes(config: VGGConfig) -> tuple[PyTree, PyTree]:
    """Returns the logical axis names of parameters and running statistics, two trees of ``PartitionSpec``."""
    return spec_axes(vgg_specs(config))


def vgg_init(key: jax.Array, config: VGGConfig, dtype: DTypeLike = jnp.float32) -> tuple[PyTree, PyTree]:
    """Draws fresh parameters of type ``dtype``, and float32 running statistics of mean 0 and variance 1."""
    params, stats = vgg_specs(config)
    return draw_params(key, params, dtype), draw_params(key, stats, jnp.float32)


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
      config: The network.
      params: Its parameters; kernels may be structured weights.
      batch_stats: Its running statistics.
      pixels: Images ``[batch, height, width, channels]`` of ``image_size``, standardised, floating point.
      train: Whether to normalise by the statistics of the (global) batch, and to drop features.
      frozen_stats: Whether to use and keep the running statistics in training too.
      key: Random key of dropout; needed to train with it.
      capture: Stages whose outputs to return as hidden states, after their max-pool: indices, or "all".
      axis_name: Mesh axes that split the batch, inside ``shard_map``.
      dtype: Type of the activations, that of ``pixels`` by default.

    Returns:
      Logits (at least float32), pooled features (the last fully connected layer, after ReLU and dropout), tokens (the
      last feature map ``[batch, h, w, channels]``), hidden states, and ``batch_stats`` after a training pass.

    Raises:
      ValueError: The images have another size or other channels, ``capture`` names no stage, or a key is missing.
    """
    check_pixels(pixels, config.channels)
    if pixels.shape[1:3] != tuple(config.image_size):
        raise ValueError(f"pixels: expected images {config.image_size}, got {pixels.shape[1:3]}")
    if train and key is None and any(config.dropout):
        raise ValueError(f"key: a random key is needed to train with dropout {config.dropout}, got None")
    wanted = captured(capture, len(config.depths))
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
