"""The convolutional autoencoder of deep subspace clustering (arXiv 2504.18179)."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from subspace_jax import nn


class _Layer(nnx.Module):
    """A kernel ``[side, side, wide, narrow]`` and a bias; of the decoder as well, whose layer maps narrow to wide."""

    def __init__(self, side: int, channels: tuple[int, int], bias: int, rngs: nnx.Rngs):
        init = jax.nn.initializers.glorot_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (side, side, *channels), jnp.float32), axes=(None,) * 4)
        self.bias = nnx.Param(jnp.zeros(bias, jnp.float32), axes=(None,))

    def down(self, x: jax.Array) -> jax.Array:
        return self._relu(nn.conv(x, self.kernel.get_value(), strides=2))

    def up(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel.get_value()
        full = jax.lax.conv_transpose(
            x,
            kernel.astype(x.dtype),
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=True,
        )
        start, (height, width) = (kernel.shape[0] - 2) // 2, x.shape[1:3]
        return self._relu(full[:, start : start + 2 * height, start : start + 2 * width])

    def _relu(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x + self.bias.get_value().astype(x.dtype).reshape(1, 1, 1, -1))


class ConvAutoencoder(nnx.Module):
    """Convolutions of stride 2 with ReLUs that halve an image, and transposed ones that double it again.

    Kernels start by Glorot's uniform draw, biases at 0.  Convolutions are padded as "SAME"; a transposed one is cropped
    to twice the side, the smaller half of the crop at the top and left.  Kernels of the decoder are stored as those of
    the encoder that they mirror.

    Args:
      channels: Channels of the image and of the output of every layer, such as ``(1, 15)``.
      kernels: Side of the kernel of every layer, such as ``(3,)``.
      rngs: Random streams; ``params`` is used.

    Raises:
      ValueError: There is no layer, not one kernel for each, a width is below 1 or a side below 2.
    """

    def __init__(self, channels: Sequence[int], kernels: Sequence[int], *, rngs: nnx.Rngs):
        channels, kernels = tuple(channels), tuple(kernels)
        if not kernels or len(channels) != len(kernels) + 1:
            raise ValueError(
                f"channels, kernels: expected those of the image and one more for each kernel, got {channels} and "
                f"{kernels}"
            )
        if min(channels) < 1 or min(kernels) < 2:
            raise ValueError(f"channels, kernels: expected at least 1 and at least 2, got {channels} and {kernels}")
        shapes = list(zip(kernels, itertools.pairwise(channels), strict=True))
        self.channels = channels[0]
        self.encoder = nnx.List(_Layer(side, pair, pair[1], rngs) for side, pair in shapes)
        self.decoder = nnx.List(_Layer(side, pair, pair[0], rngs) for side, pair in shapes[::-1])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Encodes and decodes images.

        Args:
          x: ``[n, height, width, channels]``, floating point.

        Returns:
          The decoded images, and the output of every layer of the encoder, ``[n, height', width', channels']`` each.

        Raises:
          ValueError: ``x`` is no stack of images of these channels, or a side can not be halved once for each layer.
        """
        layers = self.encode(x)
        h = layers[-1]
        for layer in self.decoder:
            h = layer.up(h)
        return h, layers

    def encode(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the output of every layer of the encoder; arguments and errors: see :meth:`__call__`."""
        check_images("x", x.shape, self.channels, len(self.encoder))
        layers = []
        for layer in self.encoder:
            x = layer.down(x)
            layers.append(x)
        return tuple(layers)


def check_images(name: str, shape: Sequence[int], channels: int, num_layers: int) -> None:
    """Raises unless a shape is ``[n, height, width, channels]`` with sides that can be halved by every layer."""
    if len(shape) != 4 or shape[3] != channels or 0 in shape:
        raise ValueError(f"{name}: expected images [n, height, width, {channels}], got shape {tuple(shape)}")
    factor = 2**num_layers
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"{name}: expected sides that are multiples of {factor}, for the decoder doubles them {num_layers} times; "
            f"got {shape[1]} x {shape[2]}"
        )
