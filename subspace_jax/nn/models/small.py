"""Small backbones: a multilayer perceptron and a convolutional network."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax.nn.layers.conv import conv
from subspace_jax.nn.layers.modules import Linear
from subspace_jax.nn.layers.norms import group_norm


class MLP(nnx.Module):
    """Linear layers with a ReLU between them; inputs of more than two axes are flattened.

    Args:
      in_features: Width of a flattened input.
      features: Widths of the layers; the last is the feature width.  Without layers, the module is the identity.
      dtype: Dtype of the activations.
      param_dtype: Dtype of the parameters.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(
        self,
        in_features: int,
        features: Sequence[int],
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = (in_features, *features)
        # Names alternate, so that consecutive kernels are sharded along opposite axes.
        names = [("embed", "mlp") if i % 2 == 0 else ("mlp", "embed") for i in range(len(features))]
        self.layers = nnx.List(
            Linear(m, n, axes=axes, param_dtype=param_dtype, rngs=rngs)
            for m, n, axes in zip(widths[:-1], widths[1:], names, strict=True)
        )
        self.dtype = dtype
        self.out_features = widths[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, ...]`` to features ``[batch, out_features]``."""
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(jax.nn.relu(x) if i else x)
        return x


class ConvBlock(nnx.Module):
    """Convolution of 3 x 3, group normalization, ReLU.

    Args:
      in_channels: Channels of the input.
      out_channels: Channels of the output.
      strides: Stride of the convolution.
      param_dtype: Dtype of the parameters.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(self, in_channels: int, out_channels: int, *, strides: int, param_dtype: DTypeLike, rngs: nnx.Rngs):
        init = jax.nn.initializers.he_normal()
        shape = (3, 3, in_channels, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype), axes=(None, None, "embed", "mlp"))
        self.scale = nnx.Param(jnp.ones((out_channels,), jnp.float32), axes=("mlp",))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32), axes=("mlp",))
        self.groups = math.gcd(8, out_channels)
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, h, w, in]`` to ``[batch, h / strides, w / strides, out]``."""
        x = conv(x, self.kernel.get_value(), strides=self.strides)
        return jax.nn.relu(group_norm(x, self.scale.get_value(), self.bias.get_value(), self.groups))


class ConvNet(nnx.Module):
    """Stages of two convolution blocks, each stage after the first at half the resolution, then average pooling.

    Args:
      in_channels: Channels of the images.
      features: Channels of the stages; the last is the feature width.
      dtype: Dtype of the activations.
      param_dtype: Dtype of the kernels.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        blocks = []
        for stage, width in enumerate(features):
            for strides in (1 if stage == 0 else 2, 1):
                blocks.append(ConvBlock(in_channels, width, strides=strides, param_dtype=param_dtype, rngs=rngs))
                in_channels = width
        self.blocks = nnx.List(blocks)
        self.project = Linear(in_channels, in_channels, axes=("embed", "mlp"), param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.out_features = in_channels

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[batch, h, w, in_channels]`` to features ``[batch, out_features]``."""
        x = x.astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.project(jnp.mean(x, axis=(1, 2)))
