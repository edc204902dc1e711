"""Deterministic transforms of 8-bit images: resizing, cropping, standardization."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from subspace_jax.data.images.decode import check_pixels

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "METHODS", "center_crop", "resize", "resized_shape", "standardize"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
METHODS = ("nearest", "bilinear", "bicubic", "lanczos")


def resize(image: np.ndarray, size: tuple[int, int], method: str = "bicubic") -> np.ndarray:
    """Resizes an image with Pillow, antialiased where it shrinks.

    Args:
      image: uint8 ``[height, width, 3]``.
      size: Height and width of the result.
      method: "nearest", "bilinear", "bicubic" or "lanczos".

    Returns:
      uint8 ``[*size, 3]``.

    Raises:
      ValueError: ``size`` has no pixels or too many.
    """
    check_pixels(*size, what=f"image of {image.shape[1]} x {image.shape[0]}, resized")
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling[method.upper()]))


def resized_shape(shape: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Returns height and width with the aspect ratio of ``shape`` and a shorter side of ``shorter``."""
    height, width = shape
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def center_crop(image: np.ndarray, size: tuple[int, int], rounding: str = "floor") -> np.ndarray:
    """Crops the center of an image; smaller images are padded with zeros first.

    Args:
      image: ``[height, width, channels]``.
      size: Height and width of the crop.
      rounding: Position of the crop where a margin is odd: "floor" (Hugging Face) or "even" (timm).

    Returns:
      ``[*size, channels]``.
    """
    missing = [max(wanted - side, 0) for side, wanted in zip(image.shape, size, strict=False)]
    if any(missing):
        # Of an odd padding the larger half is above with Hugging Face, and below with timm.
        before = [(n + 1) // 2 if rounding == "floor" else n // 2 for n in missing]
        image = np.pad(image, [(b, n - b) for b, n in zip(before, missing, strict=True)] + [(0, 0)])
    margins = [side - wanted for side, wanted in zip(image.shape, size, strict=False)]
    top, left = (n // 2 if rounding == "floor" else round(n / 2) for n in margins)
    return image[top : top + size[0], left : left + size[1]]


def standardize(
    image: np.ndarray,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: float = 1 / 255,
) -> np.ndarray:
    """Returns ``(scale * image - mean) / std`` in float32.

    Args:
      image: uint8 ``[..., channels]``, an array of NumPy or JAX.
      mean: Mean of each channel.
      std: Standard deviation of each channel.
      scale: Factor of the 8-bit values.
    """
    mean, std = (np.asarray(x, np.float64) for x in (mean, std))
    lead = (1,) * (image.ndim - 1)
    factor, shift = (np.asarray(x, np.float32).reshape(*lead, -1) for x in (scale / std, -mean / std))
    return image.astype(np.float32) * factor + shift
