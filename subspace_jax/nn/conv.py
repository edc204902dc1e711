"""The one door through which every convolution of a model goes, with kernels that are arrays or structured."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

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

    Args:
      x: ``[batch, *space, in]``, floating point; the number of its axes says over how many the window moves.
      kernel: ``[*window, in / groups, out]``, rounded to the dtype of ``x``, or a :class:`StructuredConv`.
      strides: Steps of the window, one number or one for each axis of space.
      padding: "SAME", "VALID", or zeros to add at both ends: one number, or for each axis a number or a pair.
      dilation: Distances of the window's points, one number or one for each axis.
      groups: Number of groups of channels that do not see each other; ``in`` of them is a depthwise convolution.

    Returns:
      ``[batch, *space', out]`` in the dtype of ``x``.

    Raises:
      ValueError: Shapes, or the numbers for the axes of space, don't fit together.
      TypeError: ``x`` is of integers or booleans.

    Example:
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
    letters = "DHW"[3 - space :]
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        _each("strides", strides, space),
        _padding(padding, space),
        rhs_dilation=_each("dilation", dilation, space),
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )


def _each(name: str, given: int | Sequence[int], space: int) -> tuple[int, ...]:
    numbers = (given,) * space if isinstance(given, int) else tuple(given)
    if len(numbers) != space or min(numbers) < 1:
        raise ValueError(f"{name}: expected a number of at least 1 for each of {space} axes, got {given!r}")
    return numbers


def _padding(given: Padding, space: int) -> str | list[tuple[int, int]]:
    if isinstance(given, str):
        if given not in ("SAME", "VALID"):
            raise ValueError(f"padding: expected 'SAME', 'VALID' or numbers, got {given!r}")
        return given
    each = (given,) * space if isinstance(given, int) else tuple(given)
    pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in each]
    if len(pairs) != space or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(f"padding: expected a number or a pair for each of {space} axes, got {given!r}")
    return pairs
