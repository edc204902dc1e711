"""Patches of pixels as features: a backbone without weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class PixelPatches:
    """The pixels of overlapping patches, of values in [0, 1].

    Attributes:
      side: Side of the images in pixels.
      patch: Side of a patch.
      stride: Pixels from one patch to the next.
      gray: Whether the channels are averaged.
    """

    side: int = 256
    patch: int = 8
    stride: int = 4
    gray: bool = False

    def __post_init__(self):
        for name in ("side", "patch", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive number of pixels, got {value!r}")
        if self.patch > self.side:
            raise ValueError(f"patch: expected at most the side {self.side} of an image, got {self.patch}")

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.patch * self.patch * (1 if self.gray else 3)

    def features(self, params: tuple, images: jax.Array) -> tuple[jax.Array, None]:
        """Features of images.

        Args:
          params: Empty.
          images: ``[batch, height, width, 3]`` uint8, or floating point in [0, 1], of any size.

        Returns:
          ``[batch, h, w, width]`` float32, the pixels of a patch by row, column, channel; and None for the saliency.
        """
        x = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        if self.gray:
            x = jnp.mean(x, axis=-1, keepdims=True)
        rows, columns = (
            np.arange(0, size - self.patch + 1, self.stride)[:, None] + np.arange(self.patch)[None]
            for size in x.shape[1:3]
        )
        x = x[:, rows][:, :, :, columns].swapaxes(2, 3)
        return x.reshape(*x.shape[:3], -1), None
