"""Convolution with dense or structured kernels; every convolution of a model calls it."""

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg

Padding = str | int | Sequence[int | tuple[int, int]]


@runtime_checkable
class StructuredConv(Protocol):
    """The protocol of weights that replace a convolution kernel."""

    def conv(
        self,
        x: jax.Array,
        *,
        strides: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
    ) -> jax.Array:
        """Returns the result of :func:`conv` for the same arguments."""


def conv(
    x: jax.Array,
    kernel: jax.Array | StructuredConv,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolution over one, two or three spatial axes, channels last.

    On a mesh with axes of type Auto any axis may be sharded.  With Explicit axes only the batch may be: JAX requires an
    output sharding for sharded channels.

    Args:
      x: ``[batch, *space, in]``, floating point.
      kernel: ``[*window, in / groups, out]``, cast to the dtype of ``x``, or a :class:`StructuredConv`.
      strides: Strides of the window, one number or one for each spatial axis.
      padding: "SAME", "VALID", or numbers of zeros: one for all sides, or for each spatial axis a number or a pair.
      dilation: Dilation of the window, one number or one for each spatial axis.
      groups: Number of feature groups; ``in`` of them give a depthwise convolution.  With more than one only
        reverse-mode differentiation is supported.

    Returns:
      ``[batch, *space', out]`` in the dtype of ``x``.

    Raises:
      ValueError: Shapes don't match, or an option has not one number for each spatial axis.
      TypeError: ``x`` is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> conv(jnp.ones((1, 4, 1)), jnp.ones((3, 1, 1)))[0, :, 0].tolist()
      [2.0, 3.0, 3.0, 2.0]
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"conv: expected floating-point x, got {x.dtype}")
    space = x.ndim - 2
    if not 1 <= space <= 3:
        raise ValueError(f"conv: expected x [batch, *space, in] with one to three spatial axes, got {x.shape}")
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
    return _grouped(x, kernel, how) if groups > 1 else _convolved(x, kernel, *how)


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


def _padded(x, window, strides, padding, dilation):
    if isinstance(padding, str):
        reach = [(n - 1) * step + 1 for n, step in zip(window, dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _seen(padded, point, window, strides, dilation):
    """The inputs that one point of the window multiplies, for every output."""
    slices = []
    for p, n, step, wide, size in zip(point, window, strides, dilation, padded.shape[1:-1], strict=True):
        outputs = max(0, (size - (n - 1) * wide - 1) // step + 1)
        slices.append(slice(p * wide, p * wide + (outputs - 1) * step + 1, step) if outputs else slice(0, 0))
    return padded[:, *slices]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _grouped(x, kernel, how):
    """A grouped convolution whose kernel gradient is computed by matmuls.

    JAX's own derivative is a convolution with batch groups.  If the batch is sharded over some mesh axes and replicated
    over others, XLA also sums the replicas: with JAX 0.10.2 on a 2 x 2 x 2 mesh the gradient was two or four times too
    large.
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
        raise ValueError(f"{name}: expected a number of at least 1 for each of {space} spatial axes, got {given!r}")
    return numbers


def _padding(given: Padding, space: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(given, str):
        if given not in ("SAME", "VALID"):
            raise ValueError(f"padding: expected 'SAME', 'VALID' or numbers, got {given!r}")
        return given
    each = (given,) * space if isinstance(given, int) else tuple(given)
    pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in each)
    if len(pairs) != space or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(f"padding: expected a number or a pair for each of {space} spatial axes, got {given!r}")
    return pairs
