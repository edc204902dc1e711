"""The one door through which every convolution of a model goes, with kernels that are arrays or structured."""

import functools
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg
from subspace_jax.nn.layers.winograd import convolved_3x3

# Channels, of either side, from which on a CPU multiplies faster than it convolves.
_WIDE = 64
# Outputs of one channel, of the whole batch, from which on tiles save more time than the sums over the kernel cost.
_MANY = 256

Padding = str | int | Sequence[int | tuple[int, int]]


@runtime_checkable
class StructuredConv(Protocol):
    """What a weight must offer to stand in the place of a convolution's kernel."""

    def conv(
        self,
        x: jax.Array,
        *,
        strides: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
    ) -> jax.Array:
        """Returns what :func:`conv` does, for the arguments that it was given."""


def conv(
    x: jax.Array,
    kernel: jax.Array | StructuredConv,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolution over one, two or three axes, channels last.

    Over mesh axes of type Auto anything may be split; over Explicit ones the batch only, for JAX would ask where the
    result of a kernel whose channels are split is to be.

    A CPU multiplies kernels with 64 channels or more on either side: windows of 3 x 3 that move by one in tiles
    (Winograd; not few outputs, channels of the other side, or a batch over Explicit axes),
    others by what all outputs see, an array of ``batch * prod(space') * prod(window) * in`` numbers; bfloat16 is
    convolved unless the window is one point.

    Args:
      x: ``[batch, *space, in]``, floating point; the number of its axes says over how many the window moves.
      kernel: ``[*window, in / groups, out]``, rounded to the dtype of ``x``, or a :class:`StructuredConv`.
      strides: Steps of the window, one number or one for each axis of space.
      padding: "SAME", "VALID", or zeros to add at both ends: one number, or for each axis a number or a pair.
      dilation: Distances of the window's points, one number or one for each axis.
      groups: Number of groups of channels that do not see each other; ``in`` of them is a depthwise convolution.  More
        than one can be differentiated in reverse only.

    Returns:
      ``[batch, *space', out]`` in the dtype of ``x``.

    Raises:
      ValueError: Shapes, or the numbers for the axes of space, don't fit together.
      TypeError: ``x`` is of integers or booleans.

    Examples:
      >>> import jax.numpy as jnp
      >>> conv(jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1)))[0, :, 0].tolist()
      [2.0, 3.0, 3.0, 2.0]
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"conv: x decides the dtype of the product; expected floating point, got {x.dtype}")
    space = x.ndim - 2
    if not 1 <= space <= 3:
        raise ValueError(f"conv: expected x [batch, *space, in] with one to three axes of space, got {x.shape}")
    if isinstance(kernel, StructuredConv):
        return kernel.conv(x, strides=strides, padding=padding, dilation=dilation, groups=groups)
    if kernel.ndim != x.ndim:
        raise ValueError(f"conv: expected a kernel of {x.ndim} axes for x {x.shape}, got {kernel.shape}")
    channels, out = kernel.shape[-2:]
    if groups < 1 or x.shape[-1] != channels * groups or out % groups:
        raise ValueError(
            f"conv: x of shape {x.shape} has {x.shape[-1]} channels, kernel {kernel.shape} takes {channels} in each "
            f"of {groups} groups, which have to divide its {out} outputs"
        )
    how = (_each("strides", strides, space), _padding(padding, space), _each("dilation", dilation, space), groups)
    kernel = kernel.astype(x.dtype)
    if groups > 1:
        return _grouped(x, kernel, how)
    one_point = kernel.size == channels * out and (isinstance(padding, str) or not np.any(how[1]))
    # Not of narrow types: the gradient for x would be a sum of rounded parts.
    if one_point or (max(channels, out) >= _WIDE and linalg.working_dtype(x) == x.dtype):
        # On a CPU XLA's convolution takes up to twice the time of the product that it is, the gradient of a stem's
        # kernel four times.  The price is an array of what all outputs see.
        return jax.lax.platform_dependent(
            x, kernel, cpu=lambda x, w: _multiplied(x, w, *how[:3]), default=lambda x, w: _convolved(x, w, *how)
        )
    return _convolved(x, kernel, *how)


def _multiplied(x, kernel, strides, padding, dilation):
    """One product with all that each output sees, or of windows of 3 x 3 those of Winograd's sums."""
    x = _padded(x, kernel.shape[:-2], strides, padding, dilation)
    if _takes_tiles(x, kernel, strides, dilation):
        return convolved_3x3(x, kernel)
    parts = [_seen(x, point, kernel.shape[:-2], strides, dilation) for point in np.ndindex(*kernel.shape[:-2])]
    # Places as one axis: for a kernel's gradient, a sum over several, XLA would first make a transposed copy.
    *places, channels = parts[0].shape
    rows = jnp.concatenate([part.reshape(math.prod(places), channels) for part in parts], axis=-1)
    return (rows @ kernel.reshape(-1, kernel.shape[-1])).reshape(*places, kernel.shape[-1])


def _takes_tiles(padded, kernel, strides, dilation) -> bool:
    """Whether Winograd's sums serve, and save time."""
    if kernel.shape[:-2] != (3, 3) or {*strides, *dilation} != {1} or min(kernel.shape[-2:]) < _WIDE // 2:
        return False
    batch, rows, columns, _ = padded.shape
    # Tiles are cut by reshapes, which JAX refuses where the batch is split over Explicit axes.
    split = any(jax.typeof(padded).sharding.spec)
    return min(rows, columns) > 2 and batch * (rows - 2) * (columns - 2) >= _MANY and not split


def _padded(x, window, strides, padding, dilation):
    if isinstance(padding, str):
        reach = [(n - 1) * step + 1 for n, step in zip(window, dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _seen(padded, point, window, strides, dilation):
    """What one point of the window sees, for each output."""
    slices = []
    for p, n, step, wide, size in zip(point, window, strides, dilation, padded.shape[1:-1], strict=True):
        outputs = max(0, (size - (n - 1) * wide - 1) // step + 1)
        slices.append(slice(p * wide, p * wide + (outputs - 1) * step + 1, step) if outputs else slice(0, 0))
    return padded[:, *slices]


def _convolved(x, kernel, strides, padding, dilation, groups):
    letters = "DHW"[5 - x.ndim :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _grouped(x, kernel, how):
    """A convolution with groups, whose kernel gets its gradient from products.

    The derivative that JAX has by itself is a convolution with groups in the batch.  Where the batch is split over some
    axes of a mesh and copied over others, the compiler adds the copies up too: with JAX 0.10.2 on a 2 x 2 x 2 mesh of
    CPU devices it was two or four times too large.
    """
    return _convolved(x, kernel, *how)


def _grouped_forward(x, kernel, how):
    return _convolved(x, kernel, *how), (x, kernel)


def _grouped_backward(how, kept, d):
    x, kernel = kept
    strides, padding, dilation, groups = how
    window = kernel.shape[:-2]
    (dx,) = jax.vjp(lambda x: _convolved(x, kernel, *how), x)[1](d)
    x = _padded(x, window, strides, padding, dilation)
    d = d.reshape(*d.shape[:-1], groups, -1)
    letters = "xyz"[: len(window)]
    rule = f"b{letters}gi,b{letters}go->igo"
    wide = linalg.working_dtype(x)
    grads = []
    for point in np.ndindex(*window):
        seen = _seen(x, point, window, strides, dilation)
        seen = seen.reshape(*seen.shape[:-1], groups, -1)
        grads.append(jnp.einsum(rule, seen, d, preferred_element_type=wide))
    return dx, jnp.stack(grads).reshape(kernel.shape).astype(kernel.dtype)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _each(name: str, given: int | Sequence[int], space: int) -> tuple[int, ...]:
    numbers = (given,) * space if isinstance(given, int) else tuple(given)
    if len(numbers) != space or min(numbers) < 1:
        raise ValueError(f"{name}: expected a number of at least 1 for each of {space} axes, got {given!r}")
    return numbers


def _padding(given: Padding, space: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(given, str):
        if given not in ("SAME", "VALID"):
            raise ValueError(f"padding: expected 'SAME', 'VALID' or numbers, got {given!r}")
        return given
    each = (given,) * space if isinstance(given, int) else tuple(given)
    pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in each)
    if len(pairs) != space or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(f"padding: expected a number or a pair for each of {space} axes, got {given!r}")
    return pairs
