"""The networks of XFactors: two encoders of one form, and a decoder (arXiv 2601.21688, the authors' "res" variant)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from subspace_jax import losses, nn
from subspace_jax.represent.xfactors.core import Codes, Outputs, SubspaceLayout

WIDTHS = (48, 96, 192)
_HALVINGS = 2 ** len(WIDTHS)


class XFactors(nnx.Module):
    """Two encoders, of the residual and of the factors, and a decoder of both codes.

    Args:
      encoder_s: Module from images ``[batch, height, width, channels]`` to means and logarithms of variances of the
        residual code, ``[batch, residual_dim]`` each; None where the layout has none.
      encoder_t: The same for the factor code.
      decoder: Module from ``[batch, residual_dim + factor_dim]`` to images in [0, 1].
      layout: The layout.
    """

    def __init__(
        self, encoder_s: nnx.Module | None, encoder_t: nnx.Module | None, decoder: nnx.Module, layout: SubspaceLayout
    ):
        self.encoder_s, self.encoder_t, self.decoder = encoder_s, encoder_t, decoder
        self.layout = layout

    def __call__(self, x: jax.Array, key: jax.Array) -> Outputs:
        """Encodes images, samples both codes, and decodes the samples."""
        codes = encode(self, x)
        of_s, of_t = jax.random.split(key)
        z_s = losses.reparameterize(of_s, codes.mu_s, codes.logvar_s)
        z_t = losses.reparameterize(of_t, codes.mu_t, codes.logvar_t)
        return Outputs(codes, z_t, decode(self, z_s, z_t))


def encode(model: XFactors, x: jax.Array) -> Codes:
    """Encodes images ``[batch, height, width, channels]``.

    Raises:
      ValueError: An encoder gives another width than the layout has.
    """
    parts = []
    named = (("s", model.encoder_s, model.layout.residual_dim), ("t", model.encoder_t, model.layout.factor_dim))
    for name, encoder, width in named:
        mu, logvar = (jnp.zeros((x.shape[0], 0), x.dtype),) * 2 if encoder is None else encoder(x)
        if mu.shape != (x.shape[0], width) or logvar.shape != mu.shape:
            raise ValueError(
                f"encoder_{name}: expected means and log-variances [batch, {width}] as the layout has, got {mu.shape} "
                f"and {logvar.shape}"
            )
        parts += [mu, logvar]
    return Codes(*parts)


def decode(model: XFactors, z_s: jax.Array, z_t: jax.Array) -> jax.Array:
    """Decodes residual codes ``[batch, residual_dim]`` and factor codes ``[batch, factor_dim]`` to images."""
    return model.decoder(jnp.concatenate([z_s, z_t], axis=-1))


def swap_factor(model: XFactors, source: Codes, reference: Codes, k: int | None) -> jax.Array:
    """Decodes images with one factor of other images.

    Args:
      model: The model.
      source: Codes of the images to change.
      reference: Codes of the images that the factor is taken from, as many.
      k: The labelled factor; None takes all that is not labelled, the residual code.

    Returns:
      Images ``[batch, height, width, channels]``, decoded from means.

    Raises:
      ValueError: There is no factor ``k``.
    """
    if k is None:
        return decode(model, reference.mu_s, source.mu_t)
    return decode(model, source.mu_s, model.layout.swap(source.mu_t, reference.mu_t, k))


class MLPEncoder(nnx.Module):
    """A perceptron with ReLUs from flattened images to a Gaussian code.

    Args:
      in_features: Numbers in an image.
      dim: Width of the code.
      hidden: Widths of the hidden layers.
      rngs: Random streams; ``params`` is used.
    """

    def __init__(self, in_features: int, dim: int, *, hidden: Sequence[int] = (256, 256, 256), rngs: nnx.Rngs):
        self.body = nn.MLP(in_features, (*hidden, 2 * dim), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps images ``[batch, height, width, channels]`` to means and log-variances ``[batch, dim]``."""
        mu, logvar = jnp.split(self.body(x), 2, axis=-1)
        return mu, logvar


class MLPDecoder(nnx.Module):
    """A perceptron with ReLUs from a code to an image.

    Args:
      dim: Width of the code.
      image_shape: Height, width and channels.
      hidden: Widths of the hidden layers.
      rngs: Random streams; ``params`` is used.
    """

    def __init__(
        self, dim: int, image_shape: Sequence[int], *, hidden: Sequence[int] = (256, 256, 256), rngs: nnx.Rngs
    ):
        self.body = nn.MLP(dim, (*hidden, math.prod(image_shape)), rngs=rngs)
        self.image_shape = tuple(image_shape)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps codes ``[batch, dim]`` to images in [0, 1]."""
        return jax.nn.sigmoid(self.body(z).reshape(-1, *self.image_shape))


class _Conv(nnx.Module):
    """A convolution of 3 x 3 with bias; with ``up`` a transposed one of 4 x 4 that doubles the image."""

    def __init__(self, channels: int, out: int, *, strides: int = 1, up: bool = False, rngs: nnx.Rngs):
        side = 4 if up else 3
        init = jax.nn.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (side, side, channels, out)), axes=(None, None, "embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros(out, jnp.float32), axes=("mlp",))
        self.strides, self.up = strides, up

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel.get_value()
        if self.up:
            y = jax.lax.conv_transpose(
                x, kernel.astype(x.dtype), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        else:
            y = nn.conv(x, kernel, strides=self.strides, padding=1)
        return y + jnp.broadcast_to(self.bias.get_value().astype(y.dtype), y.shape)


class _ConvNorm(nnx.Module):
    """Convolution, batch normalization, leaky ReLU."""

    def __init__(self, channels: int, out: int, *, strides: int = 1, up: bool = False, rngs: nnx.Rngs):
        self.conv = _Conv(channels, out, strides=strides, up=up, rngs=rngs)
        self.norm = nn.BatchNorm(out, axis="mlp")

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.leaky_relu(self.norm(self.conv(x)))


class _Block(nnx.Module):
    """Two convolutions and a shortcut: ``relu(norm(conv(relu(norm(conv(x))))) + x)``."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.convs = nnx.List(_Conv(channels, channels, rngs=rngs) for _ in range(2))
        self.norms = nnx.List(nn.BatchNorm(channels, axis="mlp") for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.norms[0](self.convs[0](x)))
        return jax.nn.relu(self.norms[1](self.convs[1](y)) + x)


class ConvEncoder(nnx.Module):
    """Residual convolutions that halve an image thrice, then a linear layer to a Gaussian code.

    Args:
      image_shape: Height, width and channels.
      dim: Width of the code.
      widths: Channels after each halving.
      rngs: Random streams; ``params`` is used.
    """

    def __init__(self, image_shape: Sequence[int], dim: int, *, widths: Sequence[int] = WIDTHS, rngs: nnx.Rngs):
        height, width, channels = image_shape
        first, second, third = widths
        self.layers = nnx.List(
            [
                _ConvNorm(channels, first, strides=2, rngs=rngs),
                _Block(first, rngs=rngs),
                _ConvNorm(first, second, strides=2, rngs=rngs),
                _Block(second, rngs=rngs),
                _ConvNorm(second, third, strides=2, rngs=rngs),
            ]
        )
        self.last = _Conv(third, third, rngs=rngs)
        size = third * -(-height // _HALVINGS) * -(-width // _HALVINGS)
        self.head = nn.Linear(size, 2 * dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps images ``[batch, height, width, channels]`` to means and log-variances ``[batch, dim]``."""
        for layer in self.layers:
            x = layer(x)
        x = jax.nn.leaky_relu(self.last(x))
        mu, logvar = jnp.split(self.head(x.reshape(x.shape[0], -1)), 2, axis=-1)
        return mu, logvar


class ConvDecoder(nnx.Module):
    """A linear layer, then residual and transposed convolutions that double an image thrice.

    The result is resized, bilinearly, where the sides are no multiples of 8.

    Args:
      dim: Width of the code.
      image_shape: Height, width and channels.
      widths: Those of the encoder.
      rngs: Random streams; ``params`` is used.
    """

    def __init__(self, dim: int, image_shape: Sequence[int], *, widths: Sequence[int] = WIDTHS, rngs: nnx.Rngs):
        height, width, channels = image_shape
        first, second, third = widths
        self.image_shape = tuple(image_shape)
        self.start = (-(-height // _HALVINGS), -(-width // _HALVINGS), third)
        self.stem = nn.Linear(dim, math.prod(self.start), rngs=rngs)
        self.layers = nnx.List(
            [
                _ConvNorm(third, third, rngs=rngs),
                _ConvNorm(third, second, up=True, rngs=rngs),
                _Block(second, rngs=rngs),
                _ConvNorm(second, first, up=True, rngs=rngs),
                _Block(first, rngs=rngs),
                _Conv(first, channels, up=True, rngs=rngs),
                _Conv(channels, channels, rngs=rngs),
            ]
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps codes ``[batch, dim]`` to images in [0, 1]."""
        x = self.stem(z).reshape(-1, *self.start)
        for layer in self.layers:
            x = layer(x)
        if x.shape[1:] != self.image_shape:
            x = jax.image.resize(x, (x.shape[0], *self.image_shape), "bilinear")
        return jax.nn.sigmoid(x)


def make_xfactors(
    key: jax.Array,
    layout: SubspaceLayout,
    image_shape: Sequence[int],
    *,
    network: str = "conv",
    widths: Sequence[int] = WIDTHS,
) -> XFactors:
    """Builds a model with networks of this module; :class:`XFactors` takes any others.

    Args:
      key: Random key of the parameters.
      layout: The layout.
      image_shape: Height, width and channels.
      network: "conv" (residual convolutions) or "mlp".
      widths: Channels of the three stages of "conv", or widths of the hidden layers of "mlp".

    Raises:
      ValueError: The network is unknown, or the widths are not as it needs them.
    """
    if network not in ("conv", "mlp"):
        raise ValueError(f"network: expected 'conv' or 'mlp', got {network!r}")
    if min(widths, default=1) < 1 or (network == "conv" and len(widths) != len(WIDTHS)):
        wanted = f"{len(WIDTHS)} numbers" if network == "conv" else "numbers"
        raise ValueError(f"widths: expected {wanted} of at least 1, got {tuple(widths)}")
    rngs = nnx.Rngs(params=key)

    def encoder(dim: int) -> nnx.Module | None:
        if not dim:
            return None
        if network == "mlp":
            return MLPEncoder(math.prod(image_shape), dim, hidden=widths, rngs=rngs)
        return ConvEncoder(image_shape, dim, widths=widths, rngs=rngs)

    dim = layout.residual_dim + layout.factor_dim
    if network == "mlp":
        decoder = MLPDecoder(dim, image_shape, hidden=widths, rngs=rngs)
    else:
        decoder = ConvDecoder(dim, image_shape, widths=widths, rngs=rngs)
    return XFactors(encoder(layout.residual_dim), encoder(layout.factor_dim), decoder, layout)
