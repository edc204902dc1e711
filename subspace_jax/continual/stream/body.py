"""Networks without biases below the heads of a stream: kernels of two axes, whose inputs are at hand.

A bias moves the outputs for inputs of all tasks, so that no projection of gradients could hold old outputs still.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Kernels = Mapping[str, jax.Array]
Linear = Callable[[str, jax.Array, jax.Array], jax.Array]


class Body(NamedTuple):
    """A network from inputs to features.

    Attributes:
      init: ``init(key)`` returns the kernels ``{name: [in, out]}``, float32, in the order of their names.
      apply: ``apply(kernels, inputs, linear)`` returns features ``[batch, features]``; ``linear(name, x, kernel)`` is
        called for every layer with its inputs ``[batch, ..., in]``.
      gains: For every layer, how much longer a change of its output can become on the way to the input of the next
        layer, or after the last one to the features; over all positions of an example.
      features: Size of the features.
    """

    init: Callable[[jax.Array], dict[str, jax.Array]]
    apply: Callable[[Kernels, jax.Array, Linear], jax.Array]
    gains: tuple[float, ...]
    features: int


def plain(name: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Applies a layer as it is."""
    del name
    return jnp.matmul(x, kernel)


def layer_inputs(body: Body, kernels: Kernels, inputs: jax.Array) -> dict[str, jax.Array]:
    """Returns the inputs of every layer, ``[batch, positions, in]``."""
    found = {}

    def linear(name, x, kernel):
        found[name] = x.reshape(x.shape[0], -1, x.shape[-1])
        return plain(name, x, kernel)

    body.apply(kernels, inputs, linear)
    return found


def mlp_body(size: int, widths: Sequence[int]) -> Body:
    """Makes linear layers with a ReLU after each; without widths, features are the inputs.

    Args:
      size: Entries of an input, which is flattened.
      widths: Widths of the layers.
    """
    sizes = (size, *widths)
    shapes = {_name(i): pair for i, pair in enumerate(itertools.pairwise(sizes))}

    def apply(kernels, inputs, linear=plain):
        x = _floats(inputs).reshape(inputs.shape[0], -1)
        for name in shapes:
            x = jax.nn.relu(linear(name, x, kernels[name]))
        return x

    return Body(_he_normal(shapes), apply, (1.0,) * len(shapes), sizes[-1])


def convnet_body(shape: Sequence[int], widths: Sequence[int]) -> Body:
    """Makes convolutions of 3 x 3 with a ReLU after each, of stride 2 from the second on, then an average of positions.

    They are matmuls of patches: nine times the memory of the activations, and layers like any other.

    Args:
      shape: ``[height, width, channels]`` of an image.
      widths: Channels of the layers, at least one.

    Raises:
      ValueError: The shape is not that of an image, or there is no layer.
    """
    if len(shape) != 3 or not widths:
        raise ValueError(f"shape: expected [height, width, channels] and one layer or more, got {shape}, {widths}")
    height, width, channels = shape
    strides = [2 if i else 1 for i in range(len(widths))]
    sizes = (channels, *widths)
    shapes = {_name(i): (9 * m, n) for i, (m, n) in enumerate(itertools.pairwise(sizes))}
    shrunk = math.prod(-(-side // 2 ** (len(widths) - 1)) for side in (height, width))
    # A pixel is in at most 3 x 3 patches, or 2 x 2 of stride 2.
    gains = (*(2.0 for _ in strides[1:]), 1 / math.sqrt(shrunk))

    def apply(kernels, inputs, linear=plain):
        x = _floats(inputs)
        for name, stride in zip(shapes, strides, strict=True):
            patches = jax.lax.conv_general_dilated_patches(
                x,
                (3, 3),
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )
            x = jax.nn.relu(linear(name, patches, kernels[name]))
        return jnp.mean(x, axis=(1, 2))

    return Body(_he_normal(shapes), apply, gains, sizes[-1])


def _name(i: int) -> str:
    return f"layer{i:02}"


def _floats(inputs: jax.Array) -> jax.Array:
    scale = 1 / 255 if inputs.dtype == jnp.uint8 else 1.0
    return inputs.astype(jnp.float32) * scale


def _he_normal(shapes: Mapping[str, tuple[int, int]]) -> Callable[[jax.Array], dict[str, jax.Array]]:
    def init(key):
        make = jax.nn.initializers.he_normal()
        keys = jax.random.split(key, max(len(shapes), 1))
        return {name: make(k, shape, jnp.float32) for k, (name, shape) in zip(keys, shapes.items(), strict=False)}

    return init
