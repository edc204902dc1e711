"""The one door through which every convolution of a model goes."""

from collections.abc import Sequence

import jax

Padding = str | int | Sequence[tuple[int, int]]


def conv(x: jax.Array, kernel: jax.Array, *, strides: int = 1, padding: Padding = "SAME", groups: int = 1) -> jax.Array:
    """Two-dimensional convolution, channels last.

    With strides above 1, "SAME" pads by an amount that depends on the size of the image, mostly more below and right
    than above and left; the published convolutional networks pad all sides alike, which a number says.

    Args:
      x: ``[batch, height, width, in]``.
      kernel: ``[kh, kw, in / groups, out]``, rounded to the dtype of ``x``.
      strides: Step in both directions.
      padding: "SAME", "VALID", zeros on each side, or ``((top, bottom), (left, right))``.
      groups: Into how many parts, each convolved by itself, the channels fall.

    Returns:
      ``[batch, height', width', out]`` in the dtype of ``x``.

    Raises:
      ValueError: The channels of ``x`` are not those that the kernel takes, or don't fall into groups.
    """
    if x.ndim != 4 or x.shape[-1] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"conv: expected x [batch, height, width, {kernel.shape[2] * groups}] for a kernel {kernel.shape} in "
            f"{groups} groups, got {x.shape}"
        )
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (strides, strides),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
