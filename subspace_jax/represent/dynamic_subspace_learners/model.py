"""Networks of dynamic subspace learners: backbone, spatial attention, embedding in subspaces (arXiv 2206.09068)."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax import nn
from subspace_jax.nn.models.small import ConvBlock
from subspace_jax.represent.dynamic_subspace_learners import core
from subspace_jax.train.fields import check_choice, check_share

BACKBONES = ("mlp", "convnet", "resnet18", "resnet50")
DTYPES = ("float32", "bfloat16")


class Embedded(NamedTuple):
    """What a network gives.

    Attributes:
      embedding: ``[batch, neurons]``, at least float32, each learner's part of unit length.
      features: Pooled features before the embedding layer, ``[batch, channels]``.
      attention: Attention maps between 0 and 1, ``[batch, h, w, 1]``; None without attention.
    """

    embedding: jax.Array
    features: jax.Array
    attention: jax.Array | None


class SpatialAttention(nnx.Module):
    """A map of where to look: 3 x 3 convolutions of ``c / 8``, ``c / 32`` and 1 channels with ReLU between, a sigmoid.

    Args:
      features: Channels ``c`` of the input.
      param_dtype: Dtype of the parameters.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(self, features: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        widths = (features, max(1, features // 8), max(1, features // 32), 1)
        init = jax.nn.initializers.he_normal()

        def kernel(m: int, n: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (3, 3, m, n), param_dtype), axes=(None, None, "embed", None))

        self.kernels = nnx.List([kernel(m, n) for m, n in itertools.pairwise(widths)])
        self.biases = nnx.List([nnx.Param(jnp.zeros(n, param_dtype), axes=(None,)) for n in widths[1:]])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, h, w, features]`` to ``[batch, h, w, 1]`` between 0 and 1."""
        for i, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            x = nn.conv(jax.nn.relu(x) if i else x, kernel.get_value(), padding=1)
            x = x + jnp.broadcast_to(bias.get_value().astype(x.dtype), x.shape)
        return jax.nn.sigmoid(x)


class SubspaceEmbedding(nnx.Module):
    """A linear layer whose outputs are divided among learners, each part scaled to unit length.

    Which learner a neuron belongs to is the variable ``learner_id``, int32 ``[features]``.

    Args:
      in_features: Width of the input.
      features: Neurons, at least 6.
      learners: Learners at the start, of contiguous neurons.
      max_learners: The most that there may be.
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: There are too few neurons, or the numbers of learners do not fit.
    """

    def __init__(self, in_features: int, features: int, *, learners: int = 1, max_learners: int = 8, rngs: nnx.Rngs):
        core.check_num_neurons("features", features)
        if not 1 <= learners <= max_learners <= features:
            raise ValueError(
                f"learners, max_learners: expected 1 <= learners <= max_learners <= {features} neurons, got "
                f"{learners} and {max_learners}"
            )
        learner_id = core.contiguous_learners(features, learners)
        drawn = core.fresh_learners(rngs.params(), in_features, learner_id, max_learners)
        self.kernel = nnx.Param(drawn["kernel"], axes=("embed", "mlp"))
        self.bias = nnx.Param(drawn["bias"], axes=("mlp",))
        self.learner_id = nnx.Variable(learner_id, axes=(None,))
        self.max_learners = max_learners

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, in_features]`` to ``[batch, features]``, at least float32."""
        e = nn.linear(
            x, self.kernel.get_value(), self.bias.get_value(), out_dtype=jnp.promote_types(x.dtype, "float32")
        )
        return core.normalize_per_learner(e, self.learner_id.get_value(), self.max_learners)


class NetworkConfig(NamedTuple):
    """Sizes of a network; all but an "mlp" have spatial attention.

    Attributes:
      backbone: One of :data:`BACKBONES`; a ResNet ends with its third stage.
      features: Widths of the layers of "mlp", or of the stages of "convnet".
      embedding: Neurons of the embedding, at least 6.
      learners: Learners at the start, of contiguous neurons.
      max_learners: The most that there may be.
      dropout: Rate of dropout before the embedding layer.
      dtype: Dtype of the activations below the embedding, "float32" or "bfloat16"; parameters are float32.
    """

    backbone: str = "mlp"
    features: Sequence[int] = (128, 128)
    embedding: int = 128
    learners: int = 1
    max_learners: int = 8
    dropout: float = 0.01
    dtype: str = "float32"


class SubspaceLearners(nnx.Module):
    """A backbone, spatial attention, average pooling, and the embedding.

    Args:
      backbone: Module from inputs to maps ``[batch, h, w, channels]`` or features ``[batch, channels]``.
      embedding: The embedding layer.
      attention: Module from maps to ``[batch, h, w, 1]``, by which they are weighted; None for no attention.
      dropout: Rate of dropout before the embedding layer.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        embedding: SubspaceEmbedding,
        attention: SpatialAttention | None = None,
        *,
        dropout: float = 0.0,
    ):
        self.backbone, self.embedding, self.attention, self.dropout = backbone, embedding, attention, dropout

    def __call__(self, inputs: jax.Array, key: jax.Array | None = None) -> Embedded:
        """Maps inputs ``[batch, ...]`` to embeddings; ``key`` is that of dropout, which only training has."""
        x, attention = self.backbone(inputs), None
        if self.attention is not None:
            attention = self.attention(x)
            x = x * attention
        pooled = jnp.mean(x, axis=(1, 2)) if x.ndim == 4 else x
        dropped = pooled
        if self.dropout and key is not None:
            kept = jax.random.bernoulli(key, 1 - self.dropout, pooled.shape)
            dropped = jnp.where(kept, pooled / (1 - self.dropout), 0)
        return Embedded(self.embedding(dropped), pooled, attention)


class _ReLUFeatures(nnx.Module):
    """A multilayer perceptron with a ReLU after its last layer too."""

    def __init__(self, in_features: int, features: Sequence[int], dtype: DTypeLike, rngs: nnx.Rngs):
        self.net = nn.MLP(in_features, features, dtype=dtype, rngs=rngs)
        self.out_features = self.net.out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.net(x))


class _ConvMaps(nnx.Module):
    """One convolution block for each stage, each stage after the first at half the resolution, without pooling."""

    def __init__(self, in_channels: int, features: Sequence[int], dtype: DTypeLike, rngs: nnx.Rngs):
        widths = (in_channels, *features)
        self.blocks = nnx.List(
            ConvBlock(m, n, strides=1 if i == 0 else 2, param_dtype=jnp.float32, rngs=rngs)
            for i, (m, n) in enumerate(itertools.pairwise(widths))
        )
        self.dtype, self.out_features = dtype, widths[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return x


class _ResNetMaps(nnx.Module):
    """A ResNet up to its third stage, at a sixteenth of the resolution; its batch norms keep their statistics."""

    def __init__(self, depth: int, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        whole = nn.ResNetConfig.resnet(depth, num_classes=0, channels=channels)
        fields = {name: getattr(whole, name)[:3] for name in ("depths", "widths", "inner_widths")}
        self.net = nn.Model(whole.replace(**fields), dtype=dtype, rngs=rngs)
        self.out_features = self.net.out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x, train=False).tokens


def make_learners(key: jax.Array, input_shape: Sequence[int], config: NetworkConfig) -> SubspaceLearners:
    """Builds a network.

    Args:
      key: Random key of the parameters.
      input_shape: Shape of one input, channels last.
      config: Its sizes.

    Returns:
      The module.

    Raises:
      ValueError: A name is unknown, a size is out of range, or the input is not an image where the backbone needs one.
    """
    name, widths = config.backbone, tuple(config.features)
    check_choice("model.backbone", name, BACKBONES)
    check_choice("model.dtype", config.dtype, DTYPES)
    check_share("model.dropout", config.dropout)
    if name in ("mlp", "convnet") and (not widths or min(widths) < 1):
        raise ValueError(f"model.features: expected widths of at least 1, got {widths}")
    if name != "mlp" and len(input_shape) != 3:
        raise ValueError(
            f"model.backbone: {name!r} expects images [height, width, channels], got shape {list(input_shape)}"
        )
    rngs = nnx.Rngs(params=key)
    if name == "mlp":
        body = _ReLUFeatures(math.prod(input_shape), widths, config.dtype, rngs)
    elif name == "convnet":
        body = _ConvMaps(input_shape[-1], widths, config.dtype, rngs)
    else:
        body = _ResNetMaps(int(name.removeprefix("resnet")), input_shape[-1], config.dtype, rngs)
    embedding = SubspaceEmbedding(
        body.out_features, config.embedding, learners=config.learners, max_learners=config.max_learners, rngs=rngs
    )
    attention = None if name == "mlp" else SpatialAttention(body.out_features, rngs=rngs)
    return SubspaceLearners(body, embedding, attention, dropout=config.dropout)
